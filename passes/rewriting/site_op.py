"""A site's own operation, read from its nodes: as a function for methods, and rewired to other weights."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from peftfx.analysis.stored_weights import as_stored, is_grouped, stack_read
from peftfx.contract.override import rows_are_trained
from peftfx.graph.rewriter import OVERRIDES, Cursor, Rewriter
from peftfx.sites.site import EXPERTS, Call, Site

_ADDMM = torch.ops.aten.addmm.default
_GROUPED = torch.ops.aten._grouped_mm.default  #: torch's own; only bfloat16, and rows of a multiple of 16 bytes
_GROUPS = 6  #: the position of `groups` in a conv's arguments


def weight_and_bias(site: Site, call: Call, nodes: dict[str, fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """Return the nodes that read the weight and the bias at one call, before any casts. A stack has no bias."""
    op, y = nodes[call.op], nodes[call.y]
    weight = as_stored(_argument(op, _weight_index(op, site)))
    if OVERRIDES in weight.meta and weight.op != "get_attr":
        raise rows_are_trained(site.path)
    while weight.op != "get_attr":  # x @ W.T, or x @ W[3]
        weight = as_stored(_argument(weight, 0))
    bias = None if site.kind == EXPERTS else bias_of(op, y)
    return weight, None if bias is None else as_stored(bias)


def read_beside(op: fx.Node, site: Site) -> list[fx.Node]:
    """Return the nodes that the operation reads besides input, weight and bias: the ends of experts' rows."""
    return [_argument(op, 2)] if site.kind == EXPERTS and is_grouped(op) else []


def one_of_stack(op: fx.Node, site: Site) -> int | None:
    """Return the number of the expert whose weight alone the operation reads."""
    read = stack_read(op) if site.kind == EXPERTS else None
    return None if read is None else read.number


class Operation:
    """A site's own operation as a function of input, weight ([out, in, ...]) and bias, everything else bound.

    The function casts weight and bias to the input's dtype, like the model does.

    Args:
        kind: the kind of the site.
        name: the operator's name in `torch.ops`.
        fixed: the operator's other arguments, including tensors.
        number: which of a stack of weights it reads, if it reads one.
    """

    def __init__(self, kind: str, name: str, fixed: tuple[object, ...], number: int | None = None) -> None:
        self.kind, self.name, self.fixed, self.number = kind, name, fixed, number
        self.target = operator.attrgetter(name)(torch.ops)

    def __reduce__(self) -> tuple[object, ...]:
        return Operation, (self.kind, self.name, self.fixed, self.number)  # an operator cannot be pickled

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kind == "linear":
            return F.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), _like(bias, x))
        if self.kind == "embedding":
            return self.target(weight, x, *self.fixed)
        if self.kind == EXPERTS and self.number is not None:
            return F.linear(x, weight[self.number].to(x.dtype), _like(bias, x))
        if self.kind == EXPERTS and self.target is _GROUPED:
            return _aligned(x, weight, *self.fixed)  # type: ignore[arg-type]
        if self.kind == EXPERTS:
            return self.target(x, weight.to(x.dtype).transpose(-2, -1), *self.fixed)
        operands = x, weight.to(x.dtype), _like(bias, x)
        return self.target(*operands, *self.fixed, x.shape[1 - weight.ndim] // weight.shape[1])


def bind(op: fx.Node, site: Site, own: Sequence[Tensor] = ()) -> Operation:
    """Return the operation of a site at one of its calls. `own` are the values of the tensors from `read_beside`."""
    fixed: Sequence[object] = own
    if site.kind == "embedding":
        fixed = op.args[2:]
    if site.kind == "conv":
        fixed = filled(op)[3:_GROUPS]
    return Operation(site.kind, str(op.target), tuple(fixed), one_of_stack(op, site))


def _aligned(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute torch's grouped product for any dtype and sizes, in bfloat16, the only dtype that it supports."""
    each = 8  # numbers in 16 bytes
    out, inner = weight.shape[-2:]
    padded = F.pad(weight.to(torch.bfloat16), (0, -inner % each, 0, -out % each)).contiguous()
    rows = F.pad(x.to(torch.bfloat16), (0, -inner % each))
    return _GROUPED(rows, padded.transpose(-2, -1), ends)[:, :out].to(x.dtype)


def rewire(
    rewriter: Rewriter,
    site: Site,
    call: Call,
    nodes: dict[str, fx.Node],
    weight: fx.Node,
    bias: fx.Node | None,
    dense: bool,
) -> None:
    """Point one call at another weight and bias. `dense` turns a grouped conv into a conv of one group."""
    op, y = nodes[call.op], nodes[call.y]
    index = _weight_index(op, site)
    at = rewriter.before(op)
    op.update_arg(index, _in_place_of(_argument(op, index), weight, at))
    old = bias_of(op, y)
    if bias is not None and (old is None or bias is not as_stored(old)):
        _set_bias(rewriter, op, y, bias if old is None else _in_place_of(old, bias, at))
    if dense:
        op.args = (*filled(op)[:_GROUPS], 1)


def _in_place_of(old: fx.Node, new: fx.Node, at: Cursor) -> fx.Node:
    """Return the new tensor with the same casts and transposes as the old tensor."""
    if old.op == "get_attr":
        return new
    source = _argument(old, 0)
    return at.copy(old, {source: _in_place_of(source, new, at)}, anew=True)


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _weight_index(op: fx.Node, site: Site) -> int:
    if site.kind == "embedding":
        return 0
    return 2 if op.target is _ADDMM else 1


def bias_of(op: fx.Node, y: fx.Node) -> fx.Node | None:
    """Return the bias at one call: an argument of the operation, or what is added to its output at `y`."""
    if op.target is _ADDMM:
        return _argument(op, 0)
    if _takes_bias(op):
        bias = op.args[2] if len(op.args) > 2 else op.kwargs.get("bias")
        return bias if isinstance(bias, fx.Node) else None
    added = y is not op and "add" in str(y.target)  # x @ W.T + b
    return _argument(y, 1) if added else None


def _set_bias(rewriter: Rewriter, op: fx.Node, y: fx.Node, bias: fx.Node) -> None:
    if op.target is _ADDMM:
        op.update_arg(0, bias)
    elif _takes_bias(op):
        op.kwargs = {k: v for k, v in op.kwargs.items() if k != "bias"}
        op.args = (*op.args[:2], bias, *op.args[3:])
    elif bias_of(op, y) is not None:
        y.update_arg(1, bias)
    else:
        rewriter.extend(op, rewriter.after(op).call(torch.ops.aten.add.Tensor, op, bias, value=op.meta["val"]))


def _takes_bias(op: fx.Node) -> bool:
    return any(name in str(op.target) for name in ("linear", "conv"))


def _argument(node: fx.Node, index: int) -> fx.Node:
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value


def filled(op: fx.Node) -> list[fx.node.Argument]:
    """Return a conv's arguments up to its groups, with defaults filled in."""
    ones = [1] * (int(str(op.target).partition("conv")[2][0]))
    padding = "valid" if str(op.target).endswith(".padding") else [0] * len(ones)
    return [*op.args, *(None, None, None, ones, padding, ones, 1)[len(op.args) :]]
