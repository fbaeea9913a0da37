"""Read a written model's weights back, and compare those that a call reads only in part: tables, and stacks of experts.

A call of a model multiplies by each number of a matrix, but picks a few rows of a table. So the calls of a verification
show what a matrix is, and of a table nearly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from peftfx.export.metadata import PERM, SOURCE
from peftfx.graph.graph import DERIVED
from peftfx.graph.lazy_weights import exact

#: Operators that read each number of their inputs.
_WHOLE = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Add", "Sub", "Mul", "Div"})
#: How far a number may be off that is computed once more, relative to its weight's largest magnitude: its sums may run
#: in another order, and the number may then be rounded the other way.
_SLACK = 1e-5
_NUMBERS = 1 << 22  #: how many numbers of a weight are compared at a time


def refuted(path: Path, program: ir.Model, read: Callable[[str], Tensor]) -> Iterator[str]:
    """Compare the tables and stacks in a model's files with their sources, and say which have other numbers.

    Args:
        path: the model's `.onnx` file.
        program: the program that was written there.
        read: returns a tensor by its name in the graph that was translated; it computes a derived one.
    """
    written = ir.load(path).graph.initializers
    for value in program.graph.initializers.values():
        source = value.meta.get(SOURCE)
        if not isinstance(source, str) or value.dtype is None or all(u.node.op_type in _WHOLE for u in value.uses()):
            continue
        stored, want = written[str(value.name)].const_value, read(source).detach()
        assert stored is not None
        perm = value.metadata_props.get(PERM)
        if perm is not None:
            want = want.permute([int(axis) for axis in perm.split()])
        dtype = tensor_adapters.to_torch_dtype(value.dtype)
        count = count_wrong(_mapped(stored, dtype), exact(want), dtype, computed=source.startswith(f"{DERIVED}."))
        if count:
            yield f"{count:,} of {want.numel():,} numbers of {value.name} in the files are not those of the model"


def _mapped(tensor: ir.TensorProtocol, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a model's files, mapped into memory if it is beside the graph."""
    if isinstance(tensor, ir.ExternalTensor):
        raw: np.ndarray = np.memmap(tensor.path, np.uint8, "c", tensor.offset or 0, (tensor.nbytes,))
    else:
        raw = np.frombuffer(bytearray(tensor.tobytes()), np.uint8)
    return torch.from_numpy(raw).view(dtype).view(tuple(tensor.shape.numpy()))


def count_wrong(got: Tensor, want: Tensor, dtype: torch.dtype, *, computed: bool) -> int:
    """Count the numbers of a stored weight that are not the wanted ones, rounded to the nearest of a dtype.

    Args:
        got: the stored weight.
        want: what it was rounded from, of the same shape.
        dtype: the dtype that it is stored in.
        computed: whether `want` was computed once more. Its sums may then run in another order.
    """
    if got.shape != want.shape:
        return max(got.numel(), 1)
    rows = max(1, _NUMBERS // max(1, math.prod(want.shape[1:])))
    parts = zip(*(t.reshape(t.shape or 1).split(rows) for t in (got, want)), strict=True)
    other = [(g, w) for g, w in parts if not torch.equal(g, w.to(dtype).to(g.dtype))]
    if not other:
        return 0
    slack = _SLACK * float(want.abs().max()) if computed else 0.0
    return sum(_far(g, w, dtype, slack) for g, w in other)


def _far(got: Tensor, want: Tensor, dtype: torch.dtype, slack: float) -> int:
    """Count the numbers that are further from the wanted ones than half a step of a dtype, and a slack."""
    if not dtype.is_floating_point:
        return int((got != want).sum())
    limits, want = torch.finfo(dtype), want.float()
    allowed = want.abs().clamp_(min=limits.tiny).mul_(limits.eps / 2).add_(slack)
    far = ~((got.float() - want).abs_() <= allowed)
    rounded = want.to(dtype).float()  # an overflow is infinite on both sides, and what is no number stays so
    return int((far & ~((got.float() == rounded) | (got.isnan() & rounded.isnan()))).sum())
