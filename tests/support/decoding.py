"""Models that decode, here and in `peft`, with the prompts that they go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from support.adapted import randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
import peftfx.runtime
from peftfx.caches.held import kept_by
from peftfx.model.adapted import AdaptedModel
from peftfx.views.decode import Decode, positions

NEW = 32


@dataclass
class Pair:
    """A model with a random LoRA on all that is linear: as `peft` has it, and as peftfx loads it from its files.

    `peft` and `modules` run the same modules; `ours` runs graphs, in calls and in `generate`.
    """

    peft: nn.Module
    ours: AdaptedModel
    directory: Path

    @cached_property
    def modules(self) -> AdaptedModel:
        """The same on the modules road."""
        return peftfx.load(self.ours.base, self.directory)

    @cached_property
    def greedy(self) -> tuple[dict[str, Tensor], Tensor]:
        """Prompts, and the tokens that `peft` generates from them, each clearly ahead of the next best."""
        return clearly_greedy(self.peft, lambda seed: prompts(seed=seed))


def clearly_greedy(model: nn.Module, texts: Callable[[int], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Texts, and the tokens that a model generates from them, each clearly ahead of the next best.

    Random weights make near-ties, and equal tokens say nothing where rounding decides.
    """
    for seed in range(20):
        made = texts(seed)
        found = model.generate(**made, **GREEDY, return_dict_in_generate=True, output_scores=True)
        best = torch.stack(found.scores).topk(2).values
        if float((best[..., 0] - best[..., 1]).min()) > 1e-4:
            return made, found.sequences
    raise AssertionError("no texts without near-ties")


def make_pair(name: str, directory: Path) -> Pair:
    torch.manual_seed(0)  # of the adapter's initial values
    model = peft.get_peft_model(
        ZOO[name].build(), peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    randomise(model)
    model.save_pretrained(str(directory))
    return Pair(model, peftfx.load(ZOO[name].build(), directory, road="graph"), directory)


def prompts(batch: int = 4, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Random prompts of different lengths, padded on the left."""
    ids = torch.randint(4, 99, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, :row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.5}


def left_padded(texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A call of these texts, filled up on the left with token 0, with its mask."""
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def assert_writes_the_same(
    served: Any, model: nn.Module, given: Mapping[str, Tensor], atol: float, **asked: Any
) -> Tensor:
    """A served model writes a model's tokens, with its logits at each; returns the tokens."""
    asked = {**asked, "output_logits": True, "return_dict_in_generate": True}
    expected, found = model.generate(**given, **asked), served.generate(**given, **asked)  # type: ignore[operator]
    assert torch.equal(found.sequences, expected.sequences)
    for own, logits in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(own, logits, atol=atol, rtol=1e-3)
    return found.sequences


def text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, and a mask that pads each row but the first on the left by another length."""
    ids = torch.randint(4, 99, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return ids, mask


def in_pieces(adapted: AdaptedModel, ids: Tensor, mask: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    """Logits of the decode view, which is given these many tokens at a time and its own cache back."""
    view, graph = adapted.view("decode"), adapted.graph(view="decode")
    assert isinstance(view, Decode)
    kept, done = kept_by(view.layers), 0
    past = [tensor.empty(len(ids)) for tensor in kept]
    for length in lengths:
        end = done + length
        given = {"input_ids": ids[:, done:end], "attention_mask": mask[:, :end]}
        if view.positions:
            given["position_ids"] = positions(mask[:, :end])[:, done:]
        given |= dict(zip(view.past_names, past, strict=True))
        output = dict(zip(graph.outputs, graph.run(*(given[s.name] for s in graph.inputs)), strict=True))
        past = [output[name] for name in view.present_names]
        assert all(p.shape == t.sizes(len(ids), end) for p, t in zip(past, kept, strict=True))
        yield output["logits"]
        done = end


LENGTH = 7  #: of a prompt


class Once(hf.LogitsProcessor):
    """Lets no token come twice behind the first `ahead`: tiny models would write one again and again."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, input_ids[:, self.ahead :], -torch.inf)
