"""Each operator that is written in others, and the function of torch that writes it.

Products and comparisons of all pairs, as in `cdist` and `cummax`, take memory for all pairs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftfx.analysis.dataflow import arguments_of
from peftfx.export.translation.composing.losses import cross_entropy
from peftfx.export.translation.composing.scattered import MEAN, embedding_bag, index_reduce, scatter_by, scatter_mean
from peftfx.graph.rewriter import Rewriter

_aten = torch.ops.aten


def compose(rewriter: Rewriter, node: fx.Node) -> bool:
    """Replace an operator by others. Return whether the node was one to be replaced."""
    function = _function_for(node)
    if function is None:
        return False
    given = [*arguments_of(node).values()]
    nodes = [value for value in given if isinstance(value, fx.Node)]
    if any(not isinstance(value.meta.get("val"), Tensor) for value in nodes):  # a size that a node computes
        return False
    places = [isinstance(value, fx.Node) for value in given]

    def run(*tensors: Tensor) -> object:
        rest = iter(tensors)
        return function(*(next(rest) if is_node else value for is_node, value in zip(places, given, strict=True)))

    plain = tuple(None if is_node else str(value) for is_node, value in zip(places, given, strict=True))
    made = rewriter.before(node).trace(run, *nodes, key=(str(node.target), plain), what=str(node.target))
    if isinstance(made, fx.Node):
        rewriter.replace(node, made)
        return True
    for user in [user for user in node.users if user.target is operator.getitem]:
        rewriter.replace(user, made[user.args[1]])
    return True


def _function_for(node: fx.Node) -> Callable[..., object] | None:
    if _has_vector(node):
        return _by_vector
    return scatter_mean if _has_mean(node) else _COMPOSED.get(node.target)


def _by_vector(x: Tensor, y: Tensor) -> Tensor:
    """Return a product with a vector, as one with a column or a row.

    Where ONNX Runtime fuses a transposition into a product with a vector, it computes another one.
    """
    if y.ndim == 1:
        return torch.matmul(x, y.unsqueeze(-1)).squeeze(-1)
    return torch.matmul(x.unsqueeze(0), y).squeeze(-2)


def _has_vector(node: fx.Node) -> bool:
    """Return whether a node is a product of which one operand is a vector, and the other is not."""
    if node.target not in _PRODUCTS:
        return False
    ranks = [value.meta["val"].ndim for value in node.args if isinstance(value, fx.Node)]
    return len(ranks) == 2 and min(ranks) == 1 < max(ranks)


def _has_mean(node: fx.Node) -> bool:
    return node.target is _aten.scatter_reduce.two and arguments_of(node)["reduce"] == MEAN


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    """Return `sqrt(a^2 + b^2)`, without squares that overflow."""
    large, small = torch.maximum(a.abs(), b.abs()), torch.minimum(a.abs(), b.abs())
    ratio = small / large.where((large > 0) & ~large.isinf(), torch.ones_like(large))
    return torch.where(large.isinf(), large, large * (1 + ratio.square()).sqrt())


def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:
    """Return the distances of the rows of `a` from those of `b`."""
    apart = a.unsqueeze(-2) - b.unsqueeze(-3)
    return torch.linalg.vector_norm(apart, p, dim=-1)


def _ordered(x: Tensor, dim: int, *, keepdim: bool, place: Callable[[int], int]) -> tuple[Tensor, Tensor]:
    """Return the value at one place of each row in order, and where it was."""
    x, dim = (x, dim) if x.ndim else (x.reshape(1), 0)
    values, places = x.sort(dim)
    at = torch.full((1,), place(x.shape[dim]), device=x.device)
    found = [taken if keepdim else taken.squeeze(dim) for taken in (t.index_select(dim, at) for t in (values, places))]
    return found[0], found[1]


def _median(x: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """Return the lower of the middle values; not a number, if a value is none."""
    value, place = _ordered(x, dim, keepdim=keepdim, place=lambda size: (size - 1) // 2)
    if not x.is_floating_point():
        return value, place
    return value.masked_fill(x.isnan().any(dim, keepdim=keepdim), torch.nan), place


def _kthvalue(x: Tensor, k: int, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    return _ordered(x, dim, keepdim=keepdim, place=lambda _: k - 1)


def _largest_so_far(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the largest value up to each place, and the last place that has it."""
    moved = x.movedim(dim, -1)
    place = torch.arange(moved.shape[-1], device=x.device)
    seen = place <= place[:, None]
    lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    values = moved.unsqueeze(-2).masked_fill(~seen, lowest).amax(-1)
    has = (moved.unsqueeze(-2) == values.unsqueeze(-1)) & seen
    places = torch.where(has, place, -1).amax(-1)
    return values.movedim(-1, dim), places.movedim(-1, dim)


def _smallest_so_far(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    values, places = _largest_so_far(-x, dim)
    return -values, places


def _searchsorted(
    rows: Tensor, values: Tensor, out_int32: bool, right: bool, side: str | None, sorter: Tensor | None
) -> Tensor:
    """Return how many values of a row in order are before each value."""
    rows = rows if sorter is None else rows.gather(-1, sorter)
    row, value = (rows if rows.ndim == 1 else rows.unsqueeze(-2)), values.unsqueeze(-1)
    before = row <= value if right or side == "right" else row < value
    return before.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def _isin(x: Tensor, among: Tensor, assume_unique: bool, invert: bool) -> Tensor:
    """Return which values are among others. torch's own way is by order, where the others are many."""
    found = (x.unsqueeze(-1) == among.flatten()).any(-1)
    return ~found if invert else found


def _rrelu(x: Tensor, lower: float, upper: float, training: bool, generator: object) -> Tensor:
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


def _tensor_split(x: Tensor, sections: int, dim: int) -> list[Tensor]:
    """Cut an axis into parts, of which the first are longer by one, for any size of the axis."""
    size, start, parts = x.shape[dim], 0, []
    for part in range(sections):
        length = (size + sections - 1 - part) // sections
        parts.append(_aten.slice.Tensor(x, dim, start, start + length))
        start = start + length
    return parts


def _signbit(x: Tensor) -> Tensor:
    return (x < 0) | ((x == 0) & (1 / x < 0))


def _copysign(x: Tensor, sign: Tensor) -> Tensor:
    return torch.where(_signbit(sign), -x.abs(), x.abs())


def _of_numbers(choose: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a function that chooses of two values, and takes the other one where a value is not a number."""
    return lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, choose(a, b)))


def _sort(x: Tensor, stable: bool | None, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    """Sort. ONNX's own order of equal values is that of a stable sort."""
    values, places = x.sort(dim, descending)
    return values, places


def _over(reduce: Callable[..., Tensor]) -> Callable[[Tensor, Sequence[int], bool], Tensor]:
    """Return a reduction that names its axes. torch's exporter does not take one over all axes, which names none."""

    def run(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
        return reduce(x, axes or list(range(x.ndim)), keepdim) if x.ndim else x.clone()

    return run


def _smallest_and_largest(x: Tensor, axis: int | None, keepdim: bool) -> tuple[Tensor, Tensor]:
    axes = [] if axis is None else [axis]
    return _over(torch.amin)(x, axes, keepdim), _over(torch.amax)(x, axes, keepdim)


def _inverse_stft(
    x: Tensor,
    n_fft: int,
    hop_length: int | None,
    win_length: int | None,
    window: Tensor | None,
    center: bool,
    normalized: bool,
    onesided: bool | None,
    length: int | None,
    return_complex: bool,
) -> Tensor:
    """Return what `torch.istft` does. torch writes it out with indices of 32 bits, which ONNX's operators refuse.

    Frames are added up where they overlap, and divided by the sum of the windows' squares there.
    """
    hop, width = n_fft // 4 if hop_length is None else hop_length, n_fft if win_length is None else win_length
    window = torch.ones(width, dtype=x.real.dtype, device=x.device) if window is None else window
    left = (n_fft - width) // 2
    window = torch.nn.functional.pad(window, (left, n_fft - width - left))
    spectra = (x if x.ndim == 3 else x.unsqueeze(0)).transpose(1, 2)
    norm = "ortho" if normalized else None
    if return_complex:
        frames = torch.fft.ifft(spectra, norm=norm)
    else:
        frames = torch.fft.irfft(spectra.narrow(-1, 0, n_fft // 2 + 1), n_fft, norm=norm)
    count = frames.shape[1]
    whole, start = n_fft + hop * (count - 1), n_fft // 2 if center else 0
    rows, columns = (torch.arange(size, device=x.device) for size in (count, n_fft))
    at = (hop * rows.unsqueeze(1) + columns).flatten()
    frames = (frames * window).flatten(1)
    silence = torch.zeros_like(frames[:, :1]).expand(-1, whole)  # torch's exporter fixes the rows of complex numbers
    added = silence.index_add(1, at, frames)
    squares = torch.zeros(whole, dtype=window.dtype, device=x.device)
    squares = squares.index_add(0, at, window.square().repeat(count))
    sound = added.narrow(1, start, whole - start) / squares.narrow(0, start, whole - start)
    if length is not None:
        sound = torch.nn.functional.pad(sound, (0, length)).narrow(1, 0, length)
    elif center:
        sound = sound.narrow(1, 0, whole - 2 * start)
    return sound if x.ndim == 3 else sound.squeeze(0)


_PRODUCTS = frozenset({_aten.matmul.default, _aten.mv.default})
_COMPOSED: Mapping[Any, Callable[..., object]] = {
    _aten.hypot.default: _hypot,
    _aten._is_all_true.default: torch.all,
    _aten.cdist.default: _cdist,
    _aten._cdist_forward.default: _cdist,
    _aten.median.dim: _median,
    _aten.median.default: lambda x: _median(x.flatten(), 0, keepdim=False)[0],
    _aten.kthvalue.default: _kthvalue,
    _aten.cummax.default: _largest_so_far,
    _aten.cummin.default: _smallest_so_far,
    _aten.searchsorted.Tensor: _searchsorted,
    _aten.isin.Tensor_Tensor: _isin,
    _aten.rrelu.default: _rrelu,
    _aten.sort.stable: _sort,
    _aten.argsort.stable: lambda x, stable, dim, descending: _sort(x, stable, dim, descending)[1],
    _aten.amax.default: _over(torch.amax),
    _aten.amin.default: _over(torch.amin),
    _aten.aminmax.default: _smallest_and_largest,
    _aten.fmax.default: _of_numbers(torch.maximum),
    _aten.fmin.default: _of_numbers(torch.minimum),
    _aten.signbit.default: _signbit,
    _aten.copysign.Tensor: _copysign,
    _aten.cross_entropy_loss.default: cross_entropy,
    _aten.tensor_split.sections: _tensor_split,
    _aten.scatter.reduce: scatter_by,
    _aten.scatter.value_reduce: scatter_by,
    _aten.istft.default: _inverse_stft,
    _aten.embedding_bag.default: embedding_bag,
    _aten.embedding_bag.padding_idx: embedding_bag,
    _aten.index_reduce.default: index_reduce,
}
