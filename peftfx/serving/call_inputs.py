"""What users pass in a call of a served model, as the tensors that its graphs take."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftfx.errors import PeftfxError, first_line, shown
from peftfx.views.row_adapters import IDS

_TOKENS = frozenset({"input_ids", "decoder_input_ids"})
_HINT = "pass whole numbers [batch, sequence], as a tokenizer gives them with return_tensors='pt'"


def taken(name: str, value: Any) -> Any:
    """Return an argument as a tensor, if it is an array or a list. Tokens of 32 bits become tokens of 64.

    ONNX would count a negative token from the end of the vocabulary, where torch refuses it.

    Raises:
        PeftfxError: tokens are no rows of whole numbers of 0 or more, or a list holds no numbers.
    """
    if name != IDS and isinstance(value, np.ndarray | list | tuple):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PeftfxError(f"not a tensor: {shown(value)} ({first_line(error)})", name, _HINT) from error
    if name not in _TOKENS or not isinstance(value, Tensor):
        return value
    if value.ndim != 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        told = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise PeftfxError(f"tokens are rows of whole numbers, not {told}", name, _HINT)
    if (value < 0).any():
        raise PeftfxError(f"a token is negative: {int(value.min())}", name, "mask padding by attention_mask")
    return value.long()
