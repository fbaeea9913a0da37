"""What users pass in a call of a served model, as the tensors that its graphs take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftfx.errors import PeftfxError, first_line, shown
from peftfx.views.row_adapters import IDS

ONNX_DTYPES = {
    "tensor(double)": torch.float64,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
}
_TOKENS = frozenset({"input_ids", "decoder_input_ids"})
_HINT = "pass whole numbers [batch, sequence], as a tokenizer gives them with return_tensors='pt'"


def taken_apart(inputs: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the arguments of a call with a graph's inputs, such as `batch.ids`, taken out of tables and lists.

    Args:
        inputs: the arguments, as the model's own code takes them or by the graph's names.
        names: the names of the graph's inputs.
    """
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        items = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if name not in names and isinstance(items, Mapping) and any(n.startswith(f"{name}.") for n in names):
            found |= taken_apart({f"{name}.{key}": item for key, item in items.items()}, names)
        else:
            found[name] = value
    return found


def taken(name: str, value: Any) -> Any:
    """Return an argument as a tensor, if it is an array or a list. Tokens of 32 bits become tokens of 64.

    ONNX would count a negative token from the end of the vocabulary, where torch refuses it.

    Raises:
        PeftfxError: tokens are no rows of whole numbers of 0 or more, or a list holds no numbers.
    """
    if name != IDS and isinstance(value, np.ndarray | list | tuple):
        try:
            value = torch.as_tensor(_plain(value) if isinstance(value, np.ndarray) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PeftfxError(f"not a tensor: {shown(value)} ({first_line(error)})", name, _HINT) from error
    if name not in _TOKENS or not isinstance(value, Tensor):
        return value
    if value.ndim != 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        told = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise PeftfxError(f"tokens are rows of whole numbers, not {told}", name, _HINT)
    value = value.long()
    if (value < 0).any():
        raise PeftfxError(f"a token is negative: {int(value.min())}", name, "mask padding by attention_mask")
    return value


def fitted(value: Tensor, kind: str) -> Tensor:
    """Return a tensor in the dtype that a graph takes.

    Whole numbers and booleans become whole numbers of 64 bits. Floating-point numbers become those of the graph.

    Args:
        value: the tensor of a call.
        kind: the type of the graph's input, as ONNX Runtime writes it, such as `tensor(float16)`.
    """
    wanted = ONNX_DTYPES.get(kind)
    if kind == "tensor(int64)" and not value.is_floating_point() and not value.is_complex():
        return value.long()
    return value.to(wanted) if wanted is not None and value.is_floating_point() else value


def _plain(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array in the order of bytes and of rows that torch reads."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
