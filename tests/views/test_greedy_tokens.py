"""Greedy tokens of every method: `generate` of ours, and ONNX Runtime, give those of `peft`'s forward, row by row.

`peft`'s own `generate` loses prompts and prefixes behind the first token, and positions of rows that are padded. So the
oracle is its forward: one row at a time, without padding, without a cache, the whole text again for each token.
`pytest -m slow tests/views/test_greedy_tokens.py` has each method on each model that it is for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.decoding import LENGTH, NEW, Once, prompts
from support.peft_adapters import ADAPTION, adapted, linear
from support.soft_cases import build, task
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import runtime
from peftfx.export.command import export_directory

CAUSAL = ("gpt2", "llama", "bloom", "opt", "gpt_j", "gpt_neox", "gpt_neo", "glm", "qwen2", "falcon", "phi3")
PAIRED = ("t5", "bart")  #: encoder-decoders
QUICK = {("mlp", "llama")}


def cases() -> Iterator[tuple[str, str]]:
    for method in ("lora", "dora", "adalora", "ia3", "prompt", "mlp", "prefix"):
        yield from ((method, name) for name in (*CAUSAL, *PAIRED))
    yield from (("adaption", name) for name in ADAPTION)


def made(method: str, name: str) -> tuple[nn.Module, nn.Module]:
    """A base, and `peft`'s model on a copy of it."""
    torch.manual_seed(5)  # an adapter drawn by chance may change no token
    if method != "lora":
        return adapted(method, name)
    base = build(name)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=linear(base), r=4, lora_alpha=6))
    randomise(theirs)
    return base, theirs.eval()


@torch.no_grad()
def tokens_of_peft(theirs: nn.Module, ids: Tensor, mask: Tensor, paired: bool) -> tuple[Tensor, float]:
    """Greedy tokens behind one row of text, each once, and how far each was ahead of the next best.

    An encoder has the row with its padding: BART counts positions from the first token, padding or not.
    """
    ids, mask = (ids, mask) if paired else (ids[mask.bool()][None], mask[mask.bool()][None])
    written = torch.full((1, 1), int(theirs.config.decoder_start_token_id)) if paired else ids  # type: ignore[union-attr, arg-type]
    start, nearest = written.shape[1], float("inf")
    for _ in range(NEW):
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written}
        if not paired:
            given = {"input_ids": written, "attention_mask": torch.ones_like(written)}
        scores = theirs(**given, use_cache=False).logits[:, -1]
        scores = scores.scatter(1, written[:, start:], -torch.inf)
        scores[:, theirs.config.eos_token_id] = -torch.inf  # type: ignore[union-attr, index]
        best = scores.topk(2)
        nearest = min(nearest, float(best.values[0, 0] - best.values[0, 1]))
        written = torch.cat([written, best.indices[:, :1]], 1)
    return written[:, start:], nearest


def clear(theirs: nn.Module, paired: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Four prompts padded on the left, and their tokens, none of them a near-tie."""
    for seed in range(30):
        given = prompts(seed=seed)
        rows = zip(given["input_ids"].split(1), given["attention_mask"].split(1), strict=True)
        found = [tokens_of_peft(theirs, ids, mask, paired) for ids, mask in rows]
        if min(nearest for _, nearest in found) > 1e-4:
            return given, torch.cat([tokens for tokens, _ in found])
    raise AssertionError("no prompts without near-ties")


@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(m, n, id=f"{m}-{n}", marks=() if (m, n) in QUICK else pytest.mark.slow) for m, n in cases()],
)
def test_greedy_tokens_are_those_of_pefts_forward(method: str, name: str, tmp_path: Path) -> None:
    paired = ZOO[name].task == "text2text-generation"
    base, theirs = made(method, name)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    theirs.save_pretrained(str(tmp_path / "adapter"))
    given, want = clear(theirs, paired)
    ahead = 1 if paired else LENGTH
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "logits_processor": [Once(ahead)]}
    for road in ("graph", None):
        ours = peftfx.load(base, tmp_path / "adapter", road=road)
        assert torch.equal(ours.generate(**given, **options)[:, ahead:], want)  # type: ignore[index]
        with ours.disable_adapter():
            assert not torch.equal(ours.generate(**given, **options)[:, ahead:], want)  # type: ignore[index]
    export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=task(name), view="decode")
    assert torch.equal(runtime.load(tmp_path / "out").generate(**given, **options)[:, ahead:], want)
