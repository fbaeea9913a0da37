"""What users pass in a call of a served model, as the tensors that its graphs take."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftfx.errors import PeftfxError, first_line, shown, warn
from peftfx.formats import FROM_MASK, FROM_ONE
from peftfx.views.decode import positions
from peftfx.views.row_adapters import IDS

ONNX_DTYPES = {
    "tensor(double)": torch.float64,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
}
_TOKENS = frozenset({"input_ids", "decoder_input_ids"})
_AXES = ("batch", "sequence")  #: those of tokens, but for models with several texts in a row
_ROWS: Mapping[str, Sequence[int | str]] = {}
_HINT = "pass whole numbers [{}], as a tokenizer gives them with return_tensors='pt'"


def taken_apart(inputs: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the arguments of a call with a graph's inputs, such as `batch.ids`, taken out of tables and lists.

    Args:
        inputs: the arguments, as the model's own code takes them or by the graph's names.
        names: the names of the graph's inputs.
    """
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            value = value._asdict()  # a named tuple: the graph's inputs have the names of its fields
        items = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if name not in names and isinstance(items, Mapping) and any(n.startswith(f"{name}.") for n in names):
            found |= taken_apart({f"{name}.{key}": item for key, item in items.items()}, names)
        else:
            found[name] = value
    return found


def taken(name: str, value: Any, axes: Mapping[str, Sequence[int | str]] = _ROWS) -> Any:
    """Return an argument as a tensor, if it is an array or a list. Tokens of 32 bits become tokens of 64.

    ONNX would count a negative token from the end of the vocabulary, where torch refuses it.

    Args:
        name: the argument's name.
        value: the argument.
        axes: the axes of the graph's inputs. Tokens are rows, [batch, sequence], where it does not tell others.

    Raises:
        PeftfxError: tokens are no rows of whole numbers of 0 or more, or a list holds no numbers.
    """
    if name != IDS and isinstance(value, np.ndarray | list | tuple):
        try:
            value = torch.as_tensor(_plain(value) if isinstance(value, np.ndarray) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            hint = _HINT.format(", ".join(map(str, axes.get(name, _AXES))))
            raise PeftfxError(f"not a tensor: {shown(value)} ({first_line(error)})", name, hint) from error
    if name not in _TOKENS or value is None:
        return value
    wanted = axes.get(name, _AXES)
    if not isinstance(value, Tensor):
        hint = _HINT.format(", ".join(map(str, wanted)))
        raise PeftfxError(f"tokens are rows of whole numbers, not {shown(value)}", name, hint)
    if value.ndim != len(wanted) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        told = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        hint = _HINT.format(", ".join(map(str, wanted)))
        raise PeftfxError(f"tokens are rows of whole numbers, not {told}", name, hint)
    value = value.long()
    if (value < 0).any():
        raise PeftfxError(f"a token is negative: {int(value.min())}", name, "mask padding by attention_mask")
    return value


def tell_padding(ids: Tensor, config: object) -> None:
    """Warn of a text that begins or ends with padding tokens, and comes without a mask, as transformers does.

    A graph that is given no mask reads all tokens. Some models' own code would find the padding by its token.
    """
    pad, ends = getattr(config, "pad_token_id", None), [getattr(config, f"{name}_token_id", None) for name in _ENDS]
    if isinstance(pad, int) and pad not in ends and bool((ids[..., :1] == pad).any() or (ids[..., -1:] == pad).any()):
        warn(f"the text has padding (token {pad}), and the call has no attention_mask: the padding is read as text")


def is_default(name: str, value: Tensor, where: object) -> bool:
    """Say whether an argument that a graph does not take says what holds without it.

    Such is a mask that shows all tokens, types that are all 0, and positions that count from 0.

    Raises:
        PeftfxError: it says something else, which the graph cannot respect.
    """
    if name not in _DEFAULTS:
        return False
    told, hint = _DEFAULTS[name]
    if not bool((value == told(value)).all()):
        raise PeftfxError(f"the graph takes no {name}, and would answer as without it", str(where), hint)
    return True


def counted_positions(told: str, tokens: Tensor, mask: Tensor | None, before: int, where: object) -> Tensor:
    """Return the positions of a call that gives none, where a model's code does not count a row's places from 0.

    Args:
        told: how the code counts them, as the metadata of the export tells it.
        tokens: the tokens of the call, int64[batch, sequence].
        mask: the mask of the tokens of the past and of the call; None shows all.
        before: the number of tokens of the past.
        where: the export, for a message.

    Raises:
        PeftfxError: the code counts in a way of its own.
    """
    batch, length = tokens.shape
    if told == FROM_MASK:
        mask = torch.ones(batch, before + length) if mask is None else mask
        return positions(mask)[:, -length:]
    if told != FROM_ONE:
        what = "the model's code counts positions in a way of its own, and the call gives none"
        hint = "use generate, or pass position_ids: generate counts from 0 the tokens that the mask shows"
        raise PeftfxError(what, str(where), hint)
    return torch.arange(before + 1, before + 1 + length, device=tokens.device).expand(batch, length)


def _counted(value: Tensor) -> Tensor:
    return torch.arange(value.shape[-1], device=value.device).expand(value.shape)


_ENDS = ("bos", "eos", "sep", "cls")
#: Arguments that every text has, with the values that they have if a call does not give them, and what to do.
_DEFAULTS: Mapping[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "attention_mask": (torch.ones_like, "give rows of one length, or one row in a call, without padding"),
    "token_type_ids": (torch.zeros_like, "leave it out"),
    "position_ids": (_counted, "leave it out"),
}


def why_refused(
    error: Exception, limits: str, axes: Mapping[str, Sequence[int | str]], given: Mapping[str, Tensor]
) -> tuple[str, str]:
    """Say what is wrong with a call that a graph does not take, and what to do.

    Args:
        error: what ONNX Runtime raises.
        limits: the conditions of the export on sizes, as its metadata tells them.
        axes: the axes of the graph's inputs.
        given: the inputs of the call.
    """
    shapes = ", ".join(f"{n}: {str(t.dtype)[6:]}{list(t.shape)}" for n, t in given.items())
    outside, uneven = _OUTSIDE.search(str(error)), _UNEVEN.search(str(error))
    if outside and (rows := int(outside["last"]) + 1) > 1:  # a table of one row is a check of the graph
        what = f"the inputs ask for row {outside['row']} of a table of {rows} rows, in {outside['node']}"
        return what, f"give a shorter text, or other numbers: {shapes}"
    if unfit := unfit_size(limits, axes, given):
        return unfit, f"the inputs are {shapes}"
    if uneven:
        what = f"the text has {uneven['places']} tokens of images or sounds, and these have {uneven['rows']} features"
        return what, f"give the text and the rest of one call of the model's processor: {shapes}"
    return f"ONNX Runtime refuses these inputs: {first_line(error)}", f"the inputs are {shapes}"


#: What ONNX Runtime says of an index that is outside a tensor.
_OUTSIDE = re.compile(
    r"Name:'(?P<node>[^']*)'.*idx=(?P<row>-?\d+) must be within the inclusive range \[-?\d+,(?P<last>\d+)\]", re.DOTALL
)
#: What it says of rows that are written into another number of places.
_UNEVEN = re.compile(r"ScatterND.* shape: \{(?P<rows>\d+),\d+\}, indices shape: \{(?P<places>\d+),[23]\}", re.DOTALL)


def unfit_size(limits: str, axes: Mapping[str, Sequence[int | str]], given: Mapping[str, Tensor]) -> str:
    """Say which size of a call a graph does not take; empty if none is known.

    Args:
        limits: the conditions of the export on sizes, as its metadata tells them.
        axes: the axes of the graph's inputs.
        given: the inputs of the call.
    """
    sizes: dict[str, int] = {}
    for name, value in given.items():
        wanted = axes.get(name, ())
        if name in _TOKENS and 0 in value.shape:
            return f"{name} is {list(value.shape)}, without tokens"
        if len(wanted) != value.ndim:
            return f"{name} has {value.ndim} axes, and the graph takes {list(wanted)}"
        for place, (axis, size) in enumerate(zip(wanted, value.shape, strict=True)):
            if axis != size and isinstance(axis, int):
                return f"axis {place} of {name} is {size}, and the graph takes {axis}"
            if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                return f"{axis} is {sizes[axis]} in one input, and {size} in {name}"
    for axis, parts, sign, number in _LIMITS.findall(limits):
        if axis in sizes and not _SIGNS[sign](sizes[axis] % int(parts) if parts else sizes[axis], int(number)):
            side = f"{axis} % {parts}" if parts else axis
            return f"{axis} is {sizes[axis]}, and the graph takes {side} {sign} {number}"
    return ""


_SIGNS: Mapping[str, Callable[[int, int], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_LIMITS = re.compile(r"(?:^|; )([\w.]+)(?: % (\d+))? (<=|<|>=|>) (\d+) \(")


def fitted(value: Tensor, kind: str) -> Tensor:
    """Return a tensor in the dtype that a graph takes.

    Whole numbers and booleans become whole numbers of 64 bits, or booleans. Floating-point numbers become those of the
    graph.

    Args:
        value: the tensor of a call.
        kind: the type of the graph's input, as ONNX Runtime writes it, such as `tensor(float16)`.
    """
    wanted = ONNX_DTYPES.get(kind)
    if kind == "tensor(int64)" and not value.is_floating_point() and not value.is_complex():
        return value.long()
    if kind == "tensor(bool)" and not value.is_floating_point() and not value.is_complex():
        return value != 0
    return value.to(wanted) if wanted is not None and value.is_floating_point() else value


def _plain(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array in the order of bytes and of rows that torch reads."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
