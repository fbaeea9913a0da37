"""Soft prompts generate what the base generates behind embeddings, or a cache, that hold them; so does ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.decoding import LENGTH, NEW, Once, in_pieces, prompts, text
from support.soft_cases import COUNT, LSTM, MLP, PREFIX, PROJECTED, PROMPT_TUNING, Soft
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn
from views.test_encoder_decoder import texts

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.caches.cache import cache_of
from peftfx.model.adapted import AdaptedModel

pytestmark = pytest.mark.further

FEW = [("gpt2", "prompt"), ("llama", "prefix")]
MORE = (
    "gpt2",
    "llama",
    "bloom",
    "opt",
    "gpt_neo",
    "gpt_j",
    "gpt_neox",
    "glm",
    "qwen2",
    "gemma",
    "mistral",
    "falcon",
    "phi",
)
SLIDING = ("gpt_neo", "mistral")  #: a row's padding stands between its text and what is ahead of it
KINDS = {"prompt": PROMPT_TUNING, "prefix": PREFIX}
_GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def greedy(ahead: int = LENGTH) -> dict[str, Any]:
    """Greedy tokens, each once behind the first `ahead`."""
    return {**_GREEDY, "logits_processor": [Once(ahead)]}


@dataclass
class Case:
    """A model under a soft prompt: peft's, ours, and the base alone, which is told of the prompt in its own words."""

    name: str
    soft: Soft
    theirs: nn.Module
    ours: AdaptedModel

    @property
    def base(self) -> Any:
        return self.ours.base

    def behind(self, given: dict[str, Tensor], **options: object) -> Any:
        """What the base generates behind the soft prompt."""
        batch = len(given["input_ids"])
        mask = torch.cat([torch.ones(batch, COUNT).long(), given["attention_mask"]], 1)
        table = self.theirs.prompt_encoder["default"].embedding.weight.detach()
        if self.soft is PROMPT_TUNING:
            embedded = self.base.get_input_embeddings()(given["input_ids"])
            ahead = table[:COUNT].expand(batch, -1, -1)
            return self.base.generate(inputs_embeds=torch.cat([ahead, embedded], 1), attention_mask=mask, **options)
        method = self.ours.adapter("default").placements[0].method
        rows = table.view(COUNT, 2 * method.num_layers, method.num_attention_heads, -1).permute(1, 2, 0, 3)
        beams = batch * int(str(options.get("num_beams", 1)))
        held = cache_of(self.ours.view("decode").layers, [row.expand(beams, -1, -1, -1).clone() for row in rows])
        ids = torch.cat([torch.full((batch, COUNT), 5), given["input_ids"]], 1)  # those that a cache holds are not read
        found = self.base.generate(ids, cache=held, attention_mask=mask, **options)
        found.sequences = found.sequences[:, ids.shape[1] :]
        return found

    def clear(self) -> tuple[dict[str, Tensor], Any]:
        """Prompts, and what the base generates from them, each token clearly ahead of the next best."""
        for seed in range(30):
            given = prompts(seed=seed)
            ahead = 0 if self.soft is PROMPT_TUNING else LENGTH + COUNT
            found = self.behind(given, **greedy(ahead), output_scores=True, return_dict_in_generate=True)
            best = torch.stack(found.scores).topk(2).values
            if float((best[..., 0] - best[..., 1]).min()) > 1e-4:
                return given, found
        raise AssertionError("no inputs without near-ties")


def make(name: str, kind: str) -> Case:
    soft = KINDS[kind]
    theirs = soft.theirs(name)
    return Case(name, soft, theirs, soft.ours(theirs))


def pairs(*names: str) -> list[tuple[str, str]]:
    return [(name, kind) for name in names for kind in KINDS]


@pytest.fixture(
    scope="module",
    params=[*FEW, *(pytest.param(pair, marks=pytest.mark.slow) for pair in pairs(*MORE) if pair not in FEW)],
    ids=lambda pair: "-".join(pair),
)
def case(request: pytest.FixtureRequest) -> Case:
    return make(*request.param)


def new(tokens: Tensor, given: dict[str, Tensor]) -> Tensor:
    return tokens[:, given["input_ids"].shape[1] :]


def test_greedy_tokens_are_the_bases_in_torch_and_in_onnx_runtime(case: Case, tmp_path: Path) -> None:
    given, want = case.clear()
    assert torch.equal(new(case.ours.generate(**given, **greedy()), given), want.sequences)
    with case.ours.disable_adapter():
        plain = case.ours.generate(**given, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        moved = float((plain.logits[0] - want.scores[0]).nan_to_num(0, 0, 0).abs().max())
        assert moved > 1e-2 or case.name == "mistral"  # whose windows do not reach back to the prompt
    report = case.ours.export(tmp_path / "out", view="decode", assets=case.base.config.save_pretrained)
    assert report.engine == "fast"
    assert len(report.folded) == 1
    assert set(report.inputs) == {spec.name for spec in case.ours.graph(adapted=False, view="decode").inputs}
    served = runtime.load(tmp_path / "out")
    assert torch.equal(new(served.generate(**given, **greedy()), given), want.sequences)
    length = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["context_length"]
    assert length == (2048 if case.name == "bloom" else 64) - COUNT


@torch.no_grad()
def test_each_row_is_what_pefts_forward_makes_of_it_alone(case: Case) -> None:
    """peft 0.21.2 itself loses a prompt or prefix in `generate`, and a padded row's positions in its forward."""
    if case.name in SLIDING:
        pytest.skip("padding takes room in its window")
    given = prompts(seed=3)
    got = case.ours.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for ids, mask, row in zip(given["input_ids"], given["attention_mask"], got, strict=True):
        tokens = ids[mask.bool()][None]
        for token in row[len(ids) :]:
            logits = case.theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -1]
            logits[case.base.config.eos_token_id] = -torch.inf  # not among the fewest tokens asked for
            assert float(logits.max() - logits[token]) < 1e-4
            tokens = torch.cat([tokens, token.view(1, 1)], 1)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "prompt"), pytest.param("gpt2", "prefix", marks=pytest.mark.slow)]
)
def test_samples_and_beams_are_the_bases(name: str, kind: str) -> None:
    case, given = make(name, kind), prompts(seed=2)
    for options in ({"do_sample": True, "top_k": 20}, {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}):
        torch.manual_seed(3)
        want = case.behind(given, **options, max_new_tokens=12, return_dict_in_generate=True).sequences
        torch.manual_seed(3)
        assert torch.equal(new(case.ours.generate(**given, **options, max_new_tokens=12), given), want)


@torch.no_grad()
@pytest.mark.parametrize(
    "soft",
    [MLP, pytest.param(LSTM, marks=pytest.mark.slow), pytest.param(PROJECTED, marks=pytest.mark.slow)],
    ids=["mlp", "lstm", "projected"],
)
def test_what_a_network_makes_is_as_in_the_forward_in_pieces_too(soft: Soft) -> None:
    ours = soft.ours(soft.theirs("llama"))
    ids, mask = text(3, 9)
    want = ours(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    got = torch.cat(list(in_pieces(ours, ids, mask, [4, 3, 1, 1])), 1)
    shown = mask.bool()
    torch.testing.assert_close(got[shown], want[:, -9:][shown], atol=1e-5, rtol=1e-5)


def test_tokens_follow_the_prompt_as_it_is_trained_and_what_is_beside_it(tmp_path: Path) -> None:
    rules = [peftfx.PromptTuning(num_virtual_tokens=COUNT), peftfx.LoRA(r=3, target="attention.query | mlp")]
    ours = peftfx.transform(ZOO["llama"].build(), rules, seed=0)
    given, seen = prompts(), []
    for name in ("lora_B", "prompt_embeddings"):
        with torch.no_grad():
            for key, p in ours.adapter("default").named_parameters():
                if name in key:
                    p.add_(torch.randn_like(p))
        seen.append(ours.generate(**given, max_new_tokens=8, do_sample=False))
        tokens = given["input_ids"][:1]
        logits = ours(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -1]
        assert int(logits.argmax()) == int(seen[-1][0, tokens.shape[1]])
    assert not torch.equal(*seen)
    for merge in (True, False):
        ours.export(tmp_path / str(merge), view="decode", merge=merge, assets=ours.base.config.save_pretrained)
        served = runtime.load(tmp_path / str(merge))
        assert torch.equal(served.generate(**given, max_new_tokens=8, do_sample=False), seen[-1])


def test_a_model_whose_prompt_would_see_the_text_is_refused() -> None:
    # Two layers: the keys of the first are those of embeddings, which see nothing.
    config = hf.LlamaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, is_causal=False)
    model = hf.LlamaForCausalLM(config).eval()
    randomise(model)
    ours = peftfx.transform(model, peftfx.PromptTuning(num_virtual_tokens=COUNT))
    with pytest.raises(PeftfxError, match="see the text behind them"):
        ours.generate(**prompts(), max_new_tokens=2)
    peftfx.transform(model, peftfx.PrefixTuning(num_virtual_tokens=COUNT)).generate(**prompts(), max_new_tokens=2)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(pair, marks=pytest.mark.slow) for pair in pairs("bart", "t5") if pair[1] in ("prompt", "prefix")
    ],
    ids=lambda pair: "-".join(pair),
)
def encoded(request: pytest.FixtureRequest) -> Case:
    return make(*request.param)


@torch.no_grad()
def test_encoder_decoders_have_prompts_ahead_of_the_text_and_prefixes_ahead_of_what_they_write(
    encoded: Case, tmp_path: Path
) -> None:
    given = texts()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.5}
    got = encoded.ours.generate(**given, **options)
    encoded.ours.export(tmp_path / "out", view="decode", assets=encoded.base.config.save_pretrained)
    served = runtime.load(tmp_path / "out")
    assert torch.equal(served.generate(**given, **options), got)
    penalty = hf.RepetitionPenaltyLogitsProcessor(1.5)
    stop = encoded.base.config.eos_token_id
    for end in range(1, got.shape[1]):
        logits = encoded.theirs(**given, decoder_input_ids=got[:, :end]).logits[:, -1]
        logits[:, stop] = -torch.inf
        logits = penalty(got[:, :end], logits)
        assert float((logits.amax(1) - logits.gather(1, got[:, end : end + 1])[:, 0]).max()) < 1e-4
    with encoded.ours.disable_adapter():
        plain = encoded.ours(**given, decoder_input_ids=got[:, :3]).logits
    assert float((plain - encoded.theirs(**given, decoder_input_ids=got[:, :3]).logits).abs().max()) > 1e-3
    alone = served(input_ids=given["input_ids"][:1], decoder_input_ids=got[:1, :3]).logits
    want = encoded.theirs(input_ids=given["input_ids"][:1], decoder_input_ids=got[:1, :3]).logits
    torch.testing.assert_close(alone, want, atol=1e-4, rtol=1e-4)
