"""prepare: a graph made ready for translation, rewritten on a copy without any change of meaning in inference."""

from __future__ import annotations

import torch
from torch import fx

from peftfx.export.translation.complex_pairs import pair_complex
from peftfx.export.translation.numbers import compute_numbers
from peftfx.graph.graph import Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.optimization.cleanup import CASTS, Cleanup, source, writes
from peftfx.passes.optimization.dead_code import sweep
from peftfx.passes.optimization.slice_masks import slice_grid
from peftfx.passes.rewriting.site_op import filled

aten = torch.ops.aten
_TRANSPOSES = {aten.transpose.int, aten.permute.default}
_CONVS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_UNPROMOTED = {aten.rsub.Scalar, aten.rsub.Tensor, aten.floor_divide.Scalar, aten.floor_divide.default}
_SDPA = aten.scaled_dot_product_attention.default


def prepare(graph: Graph) -> Graph:
    """Clean up; write casts, convs without a bias and gathers in order in one form; give SDPA's outputs plain strides.

    The strides matter where the output is transposed: torch's decompositions of SDPA lay it out otherwise than SDPA
    itself does, and a `view` that the model was right to take then fails; the copy becomes an Identity and goes away
    again. SDPA without heads gets one head: its translation wants four axes.
    """
    result = Cleanup()(graph).graph  # a copy
    rewriter = Rewriter(result.module.graph)
    pair_complex(rewriter)
    compute_numbers(rewriter, result)
    written = any(writes(node) for node in result.nodes())  # then a gather, which copies, is more than its value
    for node in list(result.nodes()):
        if node.target is _SDPA and _rank(node) == 3:
            _widen(rewriter, node)
        elif node.target in CASTS and isinstance(node.meta.get("val"), torch.Tensor):
            # One form for all casts, and one that the translation knows.
            node.target, node.args, node.kwargs = (
                aten._to_copy.default,
                node.args[:1],
                {"dtype": node.meta["val"].dtype},
            )
        elif node.target in _UNPROMOTED:
            _promote(rewriter, node)
        elif node.target in _CONVS and node.args[2:3] in ((), (None,)):
            _spell_out(node)
        elif node.target in _TRANSPOSES and source(node).target is _SDPA:
            _make_contiguous(rewriter, node)
        elif not written:
            slice_grid(rewriter, node)
    sweep(rewriter)
    rewriter.close(result)
    return result


def _promote(rewriter: Rewriter, node: fx.Node) -> None:
    """Cast operands to the result's dtype: torch's exporter does not, of a float less a mask of integers."""
    dtype = node.meta["val"].dtype
    for operand in node.all_input_nodes:
        value = operand.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype != dtype:
            cast = rewriter.before(node).call(aten._to_copy.default, operand, dtype=dtype)
            node.replace_input_with(operand, cast)


def _spell_out(node: fx.Node) -> None:
    """A conv without a bias, in the form that stays so: torch's translations of others make one, 3-d a wrong one."""
    stride, padding, dilation, groups = filled(node)[3:7]
    node.target = aten.convolution.default
    node.args = (*node.args[:2], None, stride, padding, dilation, False, [0] * len(stride), groups)  # type: ignore[arg-type]


def _make_contiguous(rewriter: Rewriter, node: fx.Node) -> None:
    at, options = rewriter.after(node), {"memory_format": torch.contiguous_format}
    rewriter.extend(node, at.call(aten.clone.default, node, value=node.meta["val"], **options))


def _rank(node: fx.Node) -> int:
    value = source(node).meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _widen(rewriter: Rewriter, node: fx.Node) -> None:
    """SDPA over (batch, length, width) becomes SDPA over (batch, 1, length, width)."""
    at = rewriter.before(node)
    wide = [at.call(aten.unsqueeze.default, x, 1) for x in node.args[:3]]
    mask = node.args[3:4]
    if mask and isinstance(mask[0], fx.Node) and mask[0].meta["val"].ndim == 3:
        mask = (at.call(aten.unsqueeze.default, mask[0], 1),)
    rewriter.update(node, node.target, *wide, *mask, *node.args[4:], **node.kwargs)
    rewriter.extend(node, rewriter.after(node).call(aten.squeeze.dim, node, 1))
