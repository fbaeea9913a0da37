"""as_sentence_encoder: a transformer, with what sentence-transformers does behind it, as one model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from peftfx.bases.sentences.steps import MASK, SENTENCE, TOKEN_OUTPUT
from peftfx.errors import PeftfxError

_TAKES = ("input_ids", MASK, "token_type_ids")
_STEPS = "sentence_steps"


def as_sentence_encoder(model: nn.Module, steps: nn.Module) -> nn.Module:
    """Make of a transformer a model that returns `sentence_embedding` beside its own outputs.

    These stay, and keep their names: sentence-transformers and optimum read `last_hidden_state` from an ONNX model, and
    an adapter may act at what leads to another, a pooler.

    It is the same object: its modules keep their paths and its class's name stays, so adapters of the transformer are
    its adapters too. The steps are a module of it, `sentence_steps`.

    Args:
        model: takes `input_ids` and `attention_mask` and returns `last_hidden_state` [batch, sequence, width].
        steps: see `peftfx.bases.sentences.steps`.

    Raises:
        PeftfxError: it takes something else.
    """
    kind = type(model)
    accepted = inspect.signature(kind.forward).parameters
    if not {"input_ids", MASK} <= set(accepted) or "decoder_input_ids" in accepted:
        what = "this is not an encoder of texts: it cannot embed sentences"
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
    """Whether `as_sentence_encoder` made this."""
    return hasattr(model, _STEPS)
