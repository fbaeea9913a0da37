"""Measure on a text how far a quantised model agrees with the same model in floating point.

At each token of the text, two distributions over the next token are compared: that of the model's own code, and that of
ONNX Runtime with rounded weights. The result is the share of tokens whose likeliest next token is the same (top-1), and
the mean Kullback-Leibler divergence, in nats. The divergence is about the increase of the loss on such a text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.tasks import task_of
from peftfx.caches.held import cache_names
from peftfx.errors import PeftfxError
from peftfx.export.verification.cases import is_large
from peftfx.export.verification.comparison import Reference
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export_options.values import MaxError
from peftfx.model.adapted import AdaptedModel
from peftfx.views.decode import PAST, PRESENT, Decode, positions
from peftfx.views.encoder_decoder import DECODED, ENCODED, Decoder, Encoder
from peftfx.views.view import View

LOGITS = "logits"
_ROWS, _LENGTH = 8, 32  #: rows and tokens of the greedy text
_SEGMENTS = "image-segmentation"  #: the task whose logits are [batch, classes, height, width]
OWN, RANDOM = "its own greedy text", "random inputs"


@dataclass(frozen=True)
class Agreement:
    """The agreement of two models on a text.

    Attributes:
        tokens: the number of compared tokens.
        top1: the share of tokens whose likeliest next token is the same.
        kl: the mean Kullback-Leibler divergence, in nats.
        text: the name of the text.
    """

    tokens: int
    top1: float
    kl: float
    text: str

    def __str__(self) -> str:
        return f"top-1 {self.top1:.1%}, KL {self.kl:.2g} nats, over {self.tokens:,} tokens of {self.text}"

    def within(self, bound: MaxError) -> bool:
        """Say whether the agreement keeps to a bound on `kl` or `top1`. A bound on the error does not count here."""
        return bound.kind == "error" or (self.kl <= bound.value if bound.kind == "kl" else self.top1 >= bound.value)


class Answers(Protocol):
    """A model that takes inputs and gives outputs by name."""

    @property
    def inputs(self) -> Collection[str]:
        """The names of the model's inputs."""

    @property
    def outputs(self) -> Collection[str]:
        """The names of the model's outputs."""

    def __call__(self, **tensors: Tensor) -> Tensors:
        """Run the model, and return every output by name."""


@torch.no_grad()
def agreement(
    model: Answers,
    adapted: AdaptedModel,
    view: View | None,
    reference: Reference,
    cases: Sequence[Tensors],
    text: Tensor | None,
    named: str,
) -> Agreement | None:
    """Measure how far a quantised model agrees with its original. Return None if it chooses among no classes.

    Args:
        model: the quantised model.
        adapted: the original model.
        view: the view of both models.
        reference: computes the outputs of `adapted` in this view.
        cases: the calls of the verification, used if the model reads no text.
        text: the ids [rows, tokens] to compare on; by default the model's own greedy text.
        named: the name of the text.
    """
    if LOGITS not in model.outputs:
        return None
    feeds, told = texts(model.inputs, adapted, view, reference, cases, text, named)
    count, same, total = 0, 0.0, 0.0
    axis = 1 if task_of(adapted.base) == _SEGMENTS else -1
    for feed in feeds:
        answer = reference(feed)
        if not chooses(answer, axis):
            return None
        want, got = _shown(answer[LOGITS], model(**feed)[LOGITS], feed.get("attention_mask"), axis)
        count += len(want)
        same += float((want.argmax(-1) == got.argmax(-1)).sum())
        total += _nats(want, got)
    return Agreement(count, same / max(count, 1), total / max(count, 1), told)


def texts(
    inputs: Collection[str],
    adapted: AdaptedModel,
    view: View | None,
    reference: Reference,
    cases: Sequence[Tensors],
    text: Tensor | None,
    named: str,
) -> tuple[list[Tensors], str]:
    """Make the calls at which two models are compared, and name their text. The arguments are those of `agreement`."""
    if isinstance(view, Decode):
        own = _greedy(adapted, view, reference) if text is None else text
        return [_step(adapted, view, own)], OWN if text is None else named
    if isinstance(view, Decoder) and view.layers.masked:
        return [decoded(adapted, view, reference, text)], OWN if text is None else f"what it makes of {named}"
    if text is None:
        return list(cases), RANDOM
    if "input_ids" not in inputs:
        hint = "leave --calibration out: its error is measured at random inputs"
        raise PeftfxError("the model reads no text", named, hint)
    feed = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    return [{name: value for name, value in feed.items() if name in inputs}], named


def divergence(want: Tensor, got: Tensor, mask: Tensor | None) -> float:
    """Return the mean divergence of logits [batch, tokens, vocabulary] at unmasked tokens, in nats."""
    p, q = _shown(want, got, mask)
    return _nats(p, q) / max(len(p), 1)


def chooses(outputs: Tensors, axis: int = -1) -> bool:
    """Say whether a model gives logits of several classes. A single logit is a score, and no choice."""
    return LOGITS in outputs and outputs[LOGITS].shape[axis] > 1


def _shown(want: Tensor, got: Tensor, mask: Tensor | None, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of both models at unmasked tokens, float64 [tokens, vocabulary].

    Where there is one choice for each text, the mask of its tokens says nothing. `axis` is that of the classes.
    """
    a, b = (logits.double().cpu().movedim(axis, -1) for logits in (want, got))
    if mask is not None and a.ndim > mask.ndim and mask.shape == a.shape[:2]:
        a, b = a[mask != 0], b[mask != 0]
    return a.flatten(0, -2).log_softmax(-1), b.flatten(0, -2).log_softmax(-1)


def _nats(p: Tensor, q: Tensor) -> float:
    return float(torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum())


def _sizes(adapted: AdaptedModel) -> tuple[int, int]:
    return (_ROWS // 2, _LENGTH // 2) if is_large(adapted.base) else (_ROWS, _LENGTH)


def _step(
    adapted: AdaptedModel, view: Decode, ids: Tensor, past: Mapping[str, Tensor] | None = None, before: int = 0
) -> Tensors:
    """Make a call of a decode view with these tokens, after `before` tokens whose cache is `past`."""
    rows, length = ids.shape
    made = view.inputs(adapted.base, sizes={"batch": rows, "sequence": length, "past": 0})
    if past is not None:
        pairs = zip(view.past_names, view.present_names, strict=True)
        made |= {n: past[present] for n, present in pairs if present in past}  # those of images stay as they are
    mask = torch.ones(rows, before + length, dtype=torch.long)
    made |= {"input_ids": ids, "attention_mask": mask}
    if view.positions:
        made["position_ids"] = positions(mask)[:, -length:]
    return made


def _greedy(adapted: AdaptedModel, view: Decode, reference: Reference) -> Tensor:
    """Return text that the model generates greedily. Each row starts from a random token."""
    rows, length = _sizes(adapted)
    ids = example_inputs(adapted.base, sizes={"batch": rows, "sequence": 1}, seed=1)["input_ids"][:, -1:]
    written, past = [ids], None
    for before in range(length - 1):
        past = reference(_step(adapted, view, written[-1], past, before))
        written.append(past[LOGITS][:, -1:].argmax(-1))
    return torch.cat(written, 1)


def decoded(
    adapted: AdaptedModel, view: Decoder, reference: Reference, text: Tensor | None, rows: int | None = None
) -> Tensors:
    """Make a call of a decoder with the tokens that it generates itself for a text, or for `rows` rows of a text."""
    usual, length = _sizes(adapted)
    rows = usual if rows is None else rows
    base, layers = adapted.base, view.layers
    made = example_inputs(base, sizes={"batch": rows, "sequence": length, "decoder_sequence": 1}, seed=1)
    ids = made["input_ids"] if text is None else text[:rows]
    start, mask = made["decoder_input_ids"][: len(ids)], torch.ones_like(ids)
    encoded = EagerReference(adapted, Encoder(view.layers))({"input_ids": ids, "attention_mask": mask})
    crossed = zip(*(cache_names(kind, layers.cross, ENCODED) for kind in (PAST, PRESENT)), strict=True)
    own = view.inputs(base, sizes={"batch": len(ids), "encoder_sequence": ids.shape[1], "sequence": 1, "past": 0})
    feed = {**own, "encoder_attention_mask": mask, **{name: encoded[present] for name, present in crossed}}
    first, written = dict(feed), [start]
    for _ in range(length - 1):
        found = reference({**feed, "input_ids": written[-1]})
        written.append(found[LOGITS][:, -1:].argmax(-1))
        held = zip(*(cache_names(kind, layers.own, DECODED) for kind in (PAST, PRESENT)), strict=True)
        feed |= {name: found[present] for name, present in held}
    return {**first, "input_ids": torch.cat(written, 1)}
