"""Combine a transformer with sentence-transformers' later steps into one model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from peftfx.bases.sentences.steps import MASK, SENTENCE, TOKEN_OUTPUT
from peftfx.errors import PeftfxError

_TAKES = ("input_ids", MASK, "token_type_ids")
_STEPS = "sentence_steps"


def as_sentence_encoder(model: nn.Module, steps: nn.Module) -> nn.Module:
    """Make a transformer also return `sentence_embedding`, besides its own outputs.

    The model's own outputs stay, and keep their names. sentence-transformers and optimum read `last_hidden_state` from
    an ONNX model, and an adapter may act at a layer that leads to another output, such as a pooler.

    The result is the same object. Its modules keep their paths, and its class keeps its name, so adapters of the
    transformer fit it, too. The steps become its module `sentence_steps`.

    Args:
        model: the transformer. It takes `input_ids` and `attention_mask`, and returns `last_hidden_state` [batch,
            sequence, width].
        steps: the later steps; see `peftfx.bases.sentences.steps`.

    Raises:
        PeftfxError: the model takes other inputs.
    """
    kind = type(model)
    accepted = inspect.signature(kind.forward).parameters
    if not {"input_ids", MASK} <= set(accepted) or "decoder_input_ids" in accepted:
        what = "this model is not an encoder of texts, so it cannot embed sentences"
        raise PeftfxError(what, kind.__name__, "export it with --task feature-extraction")

    def forward(self: Any, **given: Tensor) -> dict[str, object]:
        output = kind.forward(self, **given, return_dict=True)
        features = getattr(self, _STEPS)({TOKEN_OUTPUT: output.last_hidden_state, MASK: given[MASK]})
        return {**output, SENTENCE: features[SENTENCE]}

    kept = [accepted[name] for name in ("self", *_TAKES) if name in accepted]
    forward.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    model.add_module(_STEPS, steps.to(dtype))
    return model


def embeds_sentences(model: nn.Module) -> bool:
    """Say whether `as_sentence_encoder` made this model."""
    return hasattr(model, _STEPS)
