"""Prepare a graph for translation: rewrite a copy without changing what it computes in inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peftfx.export.translation.between_casts import attend_in_float32, is_narrow, put_between_casts, scale_exactly
from peftfx.export.translation.complex_pairs import pair_complex
from peftfx.export.translation.composing.composed import compose
from peftfx.export.translation.enlarged import enlarge_as_torch, widen_sounds
from peftfx.export.translation.numbers import compute_numbers, make_tensor
from peftfx.export.translation.operators.hidden_rows import zero_hidden_rows
from peftfx.export.translation.operators.rounded_logs import widen_rounded_logs
from peftfx.export.translation.pooled import divide_sums, pool_any_size
from peftfx.graph.capturing.squeezed import SQUEEZES, squeeze_ones
from peftfx.graph.graph import BASE, Graph
from peftfx.graph.lazy_weights import exact
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.optimization.cleanup import CASTS, Cleanup, source
from peftfx.passes.optimization.dead_code import sweep
from peftfx.passes.optimization.functional import make_functional
from peftfx.passes.optimization.gathers import slice_grid, slice_run
from peftfx.passes.rewriting.site_op import filled

aten = torch.ops.aten
_TRANSPOSES = {aten.transpose.int, aten.permute.default}
_PADDED_CONVS = {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_CONVS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_UNPROMOTED = {aten.rsub.Scalar, aten.rsub.Tensor, aten.floor_divide.Scalar, aten.floor_divide.default}
_PUTS = {aten.index_put.default, aten.index_put_.default}
_BY_INDICES = {*_PUTS, aten.index.Tensor, aten._unsafe_index.Tensor, aten._unsafe_index_put.default}
_RANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_SDPA = aten.scaled_dot_product_attention.default


def prepare(graph: Graph) -> Graph:
    """Clean up a copy of a graph, and bring casts, convs, gathers and SDPA into forms that translate well.

    Transposed outputs of SDPA are copied to plain strides: torch's decompositions of SDPA return other strides than
    SDPA itself, so a valid `view` in the model would fail. The copy becomes an Identity and is removed later. SDPA
    without heads gets one head, because its translation needs four axes; axes before the heads become one; and what it
    reads of one row for all rows is repeated. Each cast gets one form, each conv without a bias as well, and gathers of
    rows in order become slices. A `squeeze` names the axes that it took in the capture. Rows that are written at the
    places of a mask are scattered, and indices have 64 bits. Numbers by which half precision is multiplied are not
    rounded, and numbers computed from sizes are tensors where the translation needs it. A model whose weights are not
    in bfloat16 computes what its code computes in bfloat16 between casts.
    """
    result = Cleanup()(graph).graph  # a copy
    rewriter = Rewriter(result.module.graph)
    pair_complex(rewriter)
    compute_numbers(rewriter, result)
    written = bool(make_functional(rewriter, _forgotten(result)))  # then a gather's copy matters, not only its value
    if not is_narrow(result.base):
        put_between_casts(rewriter)
    for given in list(result.nodes()):
        node = widen_sounds(rewriter, given)
        scale_exactly(rewriter, node)
        if node.target in _BY_INDICES:
            _widen_indices(rewriter, node)
        if node.target in _PADDED_CONVS | _CONVS:
            _give_a_row(rewriter, node)
        if node.target is _SDPA:
            attend_in_float32(rewriter, node)
            _repeat(rewriter, node)
        if node.target is _SDPA and _rank(node) == 3:
            _widen(rewriter, node)
        elif node.target is _SDPA and _rank(node) > 4:
            _flatten(rewriter, node)
        elif node.target in CASTS and isinstance(node.meta.get("val"), torch.Tensor):
            # One form for all casts, which the translation knows.
            node.target, node.args, node.kwargs = (
                aten._to_copy.default,
                node.args[:1],
                {"dtype": node.meta["val"].dtype},
            )
        elif node.target in _RANGES and node.meta["val"].is_floating_point():
            # Of a start and an end that are not both floating-point, the translation takes one's type.
            node.kwargs = {**node.kwargs, "dtype": node.meta["val"].dtype}
        elif node.target in _UNPROMOTED:
            _promote(rewriter, node)
        elif node.target in SQUEEZES:
            squeeze_ones(rewriter, node)
        elif node.target in _PUTS:
            _scatter(rewriter, node)
        elif node.target in _PADDED_CONVS:
            _pad(rewriter, node)
        elif node.target in _CONVS and node.args[2:3] in ((), (None,)):
            _spell_out(node)
        elif node.target in _TRANSPOSES and source(node).target is _SDPA:
            _make_contiguous(rewriter, node)
        elif any(rewrite(rewriter, node) for rewrite in _replacing()):
            continue
        elif not written:
            slice_grid(rewriter, node) or slice_run(rewriter, node, result)
    zero_hidden_rows(rewriter, result)
    widen_rounded_logs(rewriter, result)
    sweep(rewriter, random=True)  # layers that a model's code makes, and starts, in its own call
    rewriter.close(result)
    return result


def _replacing() -> tuple[Callable[[Rewriter, fx.Node], bool], ...]:
    """Return what replaces a node by others, and says whether it did."""
    return make_tensor, enlarge_as_torch, pool_any_size, divide_sums, compose


def _forgotten(graph: Graph) -> set[fx.Node]:
    """Return the nodes that read a tensor of the model whose memory no other node reads.

    Phi-3 writes the frequencies of its positions into a buffer, and reads them there. An ONNX graph keeps nothing for
    its next call.
    """
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes():
        if node.op == "get_attr" and str(node.target).startswith(f"{BASE}."):
            value = exact(graph.get(str(node.target)))
            if type(value) in (torch.Tensor, torch.nn.Parameter):
                found.setdefault(value.untyped_storage()._cdata, []).append(node)
    return {nodes[0] for nodes in found.values() if len(nodes) == 1}


def _promote(rewriter: Rewriter, node: fx.Node) -> None:
    """Cast operands to the result's dtype. torch's exporter does not, for example for a float minus an integer mask."""
    dtype = node.meta["val"].dtype
    for operand in node.all_input_nodes:
        value = operand.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype != dtype:
            cast = rewriter.before(node).call(aten._to_copy.default, operand, dtype=dtype)
            node.replace_input_with(operand, cast)


def _give_a_row(rewriter: Rewriter, node: fx.Node) -> None:
    """Turn a conv over (channels, ...) into a conv over one row: ONNX's takes rows alone."""
    x, weight = cast("list[fx.Node]", list(node.args[:2]))
    if x.meta["val"].ndim == weight.meta["val"].ndim:
        return
    row = rewriter.before(node).call(aten.unsqueeze.default, x, 0)
    rewriter.update(node, node.target, row, *node.args[1:], **node.kwargs)
    rewriter.extend(node, rewriter.after(node).call(aten.squeeze.dim, node, 0))


def _spell_out(node: fx.Node) -> None:
    """Write a conv without a bias in a form that keeps it so. In other forms torch adds a bias, in 3-d a wrong one."""
    stride, padding, dilation, groups = filled(node)[3:7]
    node.target = aten.convolution.default
    node.args = (*node.args[:2], None, stride, padding, dilation, False, [0] * len(stride), groups)  # type: ignore[arg-type]


def _pad(rewriter: Rewriter, node: fx.Node) -> None:
    """Write a conv whose padding is a word with the numbers: torch's decomposition fixes its sizes at the example's."""
    x, weight, bias, stride, padding, dilation, groups = cast("list[Any]", filled(node))
    sizes = weight.meta["val"].shape[2:]
    apart = [(size - 1) * by if padding == "same" else 0 for size, by in zip(sizes, dilation * len(sizes))]
    if any(total % 2 for total in apart):  # the larger half is behind
        at = rewriter.before(node)
        sides = [side for total in reversed(apart) for side in (total // 2, total - total // 2)]
        x, apart = at.call(aten.constant_pad_nd.default, x, sides), [0 for _ in apart]
    numbers = [total // 2 for total in apart]
    node.target = aten.convolution.default
    node.args = (x, weight, bias, stride, numbers, dilation, False, [0] * len(sizes), groups)


def _widen_indices(rewriter: Rewriter, node: fx.Node) -> None:
    """Make indices of 32 bits indices of 64, which alone ONNX's operators for several indices take."""
    x, indices, *rest = node.args
    narrow = [i for i in indices if isinstance(i, fx.Node) and i.meta["val"].dtype == torch.int32]  # type: ignore[union-attr]
    if narrow:
        at = rewriter.before(node)
        wide = {index: at.call(aten._to_copy.default, index, dtype=torch.int64) for index in narrow}
        node.args = (x, [wide.get(i, i) for i in indices], *rest)  # type: ignore[union-attr, arg-type]


def _scatter(rewriter: Rewriter, node: fx.Node) -> None:
    """Write rows at the places of one mask by `place_rows`, whose translation refuses any other number of rows."""
    x, indices, values, *more = node.args
    mask = indices[0] if isinstance(indices, list | tuple) and len(indices) == 1 else None
    if any(more) or not isinstance(mask, fx.Node) or not isinstance(values, fx.Node) or not isinstance(x, fx.Node):
        return
    own, place, rows = (n.meta["val"] for n in (x, mask, values))
    if place.dtype != torch.bool or rows.ndim != own.ndim - place.ndim + 1 or rows.dtype != own.dtype:
        return
    if rows.shape[1:] != own.shape[place.ndim :] or statically_known_true(rows.shape[0] == 1):  # values are repeated
        return
    if node.target is aten.index_put.default:
        rewriter.update(node, torch.ops.peftfx.place_rows.default, x, mask, values)
        return
    at = rewriter.before(node)
    for _ in range(own.ndim - place.ndim):
        mask = at.call(aten.unsqueeze.default, mask, -1)
    rewriter.update(node, aten.masked_scatter_.default, x, mask, values)


def _make_contiguous(rewriter: Rewriter, node: fx.Node) -> None:
    at, options = rewriter.after(node), {"memory_format": torch.contiguous_format}
    rewriter.extend(node, at.call(aten.clone.default, node, value=node.meta["val"], **options))


def _rank(node: fx.Node) -> int:
    value = source(node).meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _repeat(rewriter: Rewriter, node: fx.Node) -> None:
    """Repeat what SDPA reads along axes before the length where it has one entry, as torch does, and ONNX does not.

    A Q-Former's learned queries are those of all images, for example. Keys and values of one head are left as they are.
    """
    at, read = rewriter.before(node), cast("list[fx.Node]", list(node.args[:3]))
    for axis in range(_rank(node) - 2):
        sizes = [x.meta["val"].shape[axis] for x in read]
        alone = [statically_known_true(size == 1) for size in sizes]
        repeated = [i for i, one in enumerate(alone) if one and (axis == 0 or i == 0)]
        if all(alone) or not repeated:
            continue
        count = at.call(aten.sym_size.int, read[alone.index(False)], axis)
        wanted = [count if i == axis else -1 for i in range(_rank(node))]
        for i in repeated:
            read[i] = at.call(aten.expand.default, read[i], wanted)
    node.args = (*read, *node.args[3:])


def _widen(rewriter: Rewriter, node: fx.Node) -> None:
    """Turn SDPA over (batch, length, width) into SDPA over (batch, 1, length, width)."""
    at = rewriter.before(node)
    wide = [at.call(aten.unsqueeze.default, x, 1) for x in node.args[:3]]
    mask = node.args[3:4]
    if mask and isinstance(mask[0], fx.Node) and mask[0].meta["val"].ndim == 3:
        mask = (at.call(aten.unsqueeze.default, mask[0], 1),)
    rewriter.update(node, node.target, *wide, *mask, *node.args[4:], **node.kwargs)
    rewriter.extend(node, rewriter.after(node).call(aten.squeeze.dim, node, 1))


def _flatten(rewriter: Rewriter, node: fx.Node) -> None:
    """Turn SDPA over (..., heads, length, width), with several axes before the heads, into SDPA with one such axis."""
    at, rank, query = rewriter.before(node), _rank(node), node.args[0]
    sizes = [at.call(aten.sym_size.int, query, axis) for axis in range(rank - 1)]
    flat = [at.call(aten.flatten.using_ints, x, 0, rank - 4) for x in node.args[:3]]
    mask = node.args[3:4]
    if mask and isinstance(mask[0], fx.Node) and mask[0].meta["val"].ndim > 3:  # fewer axes are the same for all rows
        whole = at.call(aten.expand.default, mask[0], [*sizes[: rank - 3], -1, -1, -1])
        mask = (at.call(aten.flatten.using_ints, whole, 0, rank - 4),)
    rewriter.update(node, node.target, *flat, *mask, *node.args[4:], **node.kwargs)
    rewriter.extend(node, rewriter.after(node).call(aten.reshape.default, node, [*sizes, -1]))
