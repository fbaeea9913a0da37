"""How each kind of operator is run for several examples at once.

Each rule takes an operator's arguments by name, some of them `Several`, and its fake results for one example. It
returns the results as tensors with a first axis for the examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_letters
from typing import Any

import torch

from peftfx.graph.batching.places import picked, put
from peftfx.graph.batching.rows import attended_within, normalised, sampled, with_joined_rows
from peftfx.graph.batching.several import (
    Arguments,
    BatchRule,
    Several,
    all_several,
    as_tensors,
    aten,
    count_of,
    not_batched,
    own,
    several_of,
    tensors_of,
)

_DIMS = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "dimension")


def rule_of(op: Any) -> BatchRule:
    """Return the rule for an operator.

    Raises:
        PeftfxError: there is none.
    """
    name = op._schema.name.removeprefix("aten::")
    found = _RULES.get(name)
    if found is None and torch.Tag.pointwise in op.tags:
        found = by_elements
    if found is None:
        raise not_batched(str(op))
    return found


def by_elements(op: Any, given: Arguments, made: Any) -> Any:
    """Run an operator on elements: shapes that are broadcast are aligned behind the first axis."""
    rank = max(v.rank if isinstance(v, Several) else v.ndim for v in tensors_of(given.values()))
    return op(**{name: v.padded(rank) if isinstance(v, Several) else v for name, v in given.items()})


def as_it_is(op: Any, given: Arguments, made: Any) -> Any:
    """Run an operator that acts on last axes alone, or on each element, whatever the axes before them are."""
    several = [name for name, value in given.items() if isinstance(value, Several)]
    if several != ["indices" if op is aten.embedding.default else next(iter(given))]:
        raise not_batched(str(op))
    return op(**as_tensors(given))


def cast(op: Any, given: Arguments, made: Any) -> Any:
    """Give the values the dtype of others."""
    return aten.to.dtype(own(given).value, made.dtype)


def along_axes(op: Any, given: Arguments, made: Any) -> Any:
    """Run an operator along named axes, which are counted behind the first axis."""
    if not any(name in _DIMS for name in given) or given.get("dims", 0) == []:
        raise not_batched(str(op))  # it runs over all axes
    count = count_of(given)
    given = {n: v if n in ("index", "indices") else all_several(v, count) for n, v in given.items()}
    if any(isinstance(v, Several) for n, v in given.items() if n in ("index", "indices")):
        raise not_batched(str(op))
    if given.get("dim", 0) is None or given.get("dim", 0) == []:
        (one,) = (v for v in given.values() if isinstance(v, Several))
        given["dim"] = list(range(one.rank))
    return op(**as_tensors({n: _behind(v) if n in _DIMS else v for n, v in given.items()}))


def over_all(op: Any, given: Arguments, made: Any) -> Any:
    """Run an operator over all elements of an example."""
    one, *others = given.values()
    others = [o for o in others if o is not None]
    if others or not isinstance(one, Several):
        raise not_batched(str(op))
    flat = one.shaped((-1,))
    over = {"sum": aten.sum.dim_IntList, "mean": aten.mean.dim, "amax": aten.amax.default, "amin": aten.amin.default}
    name = op._schema.name.removeprefix("aten::")
    if name in ("all", "any"):
        return (aten.all.dim if name == "all" else aten.any.dim)(flat, 1)
    return over[{"max": "amax", "min": "amin"}.get(name, name)](flat, [1])


def reduced(op: Any, given: Arguments, made: Any) -> Any:
    """Run an operator over some axes, or over all elements."""
    return along_axes(op, given, made) if "dim" in given else over_all(op, given, made)


def shaped(op: Any, given: Arguments, made: Any) -> Any:
    """Give the values the shape of the result."""
    if "dtype" in given:
        raise not_batched(str(op))  # it reads the memory as another type
    return own(given).shaped(tuple(made.shape))


def expanded(op: Any, given: Arguments, made: Any) -> Any:
    """Repeat axes of size 1, without a copy."""
    one = own(given)
    return aten.expand.default(one.padded(made.ndim), [one.count, *made.shape])


def repeated_values(op: Any, given: Arguments, made: Any) -> Any:
    """Repeat the values along each axis."""
    times = list(given["repeats"])
    return aten.repeat.default(own(given).padded(len(times)), [1, *times])


def reordered(op: Any, given: Arguments, made: Any) -> Any:
    """Put the axes of an example in another order."""
    return aten.permute.default(own(given).value, [0, *_behind(given["dims"])])


def axes_reversed(op: Any, given: Arguments, made: Any) -> Any:
    """Reverse the order of an example's axes."""
    one = own(given)
    return aten.permute.default(one.value, [0, *range(one.rank, 0, -1)])


def matrix_product(op: Any, given: Arguments, made: Any) -> Any:
    """Multiply matrices."""
    one, other = list(given.values())[:2]
    ranks = [v.rank if isinstance(v, Several) else v.ndim for v in (one, other)]
    if min(ranks) < 2:
        raise not_batched(str(op))
    one, other = (v.padded(max(ranks)) if isinstance(v, Several) else v for v in (one, other))
    return aten.matmul.default(one, other)


def added_product(op: Any, given: Arguments, made: Any) -> Any:
    """Multiply matrices, and add a vector."""
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or isinstance(given["self"], Several):
        raise not_batched(str(op))
    return aten.add.Tensor(matrix_product(op, {n: given[n] for n in ("mat1", "mat2")}, made), given["self"])


def summed_by_letters(op: Any, given: Arguments, made: Any) -> Any:
    """Multiply and sum along axes with letters: a letter of its own goes along the examples."""
    sides, arrow, result = given["equation"].replace(" ", "").partition("->")
    if not arrow or "." in sides:
        raise not_batched(str(op))
    free = next(letter for letter in ascii_letters if letter not in sides)
    several = [isinstance(value, Several) for value in given["tensors"]]
    parts = [free * own + side for own, side in zip(several, sides.split(","), strict=True)]
    values = [value.value if isinstance(value, Several) else value for value in given["tensors"]]
    return op(f"{','.join(parts)}->{free}{result}", values)


def made_anew(op: Any, given: Arguments, made: Any) -> Any:
    """Make a tensor of one value, of the type of another: the same for all examples."""
    shared = several_of(op(**as_tensors(given)), count_of(given)).value
    return aten.clone.default(shared, memory_format=torch.contiguous_format)  # the code may write into it


def _behind(dims: Any) -> Any:
    """Return axes of an example as axes behind the first one."""
    if isinstance(dims, list | tuple):
        return [_behind(dim) for dim in dims]
    return dims + 1 if isinstance(dims, int) and dims >= 0 else dims


def _named(names: str, rule: BatchRule) -> dict[str, BatchRule]:
    return dict.fromkeys(names.split(), rule)


_RULES: Mapping[str, BatchRule] = {
    **_named("linear layer_norm rms_norm embedding dropout alias contiguous clone to detach lift one_hot", as_it_is),
    **_named("bucketize constant_pad_nd pad zeros_like ones_like full_like empty_like lift_fresh_copy", as_it_is),
    **_named("type_as", cast),
    **_named("floor_divide where masked_fill __and__ __or__ __xor__ copy_ fill_ square", by_elements),
    **_named("permute", reordered),
    **_named("transpose select slice unbind cat concat stack unsqueeze split split_with_sizes", along_axes),
    **_named("chunk flip cumsum index_select unfold softmax log_softmax roll repeat_interleave narrow", along_axes),
    **_named("index_add index_add_ _softmax argmax argmin topk sort norm std var", along_axes),
    **_named("sum mean all any max min amax amin", reduced),
    **_named("view reshape _unsafe_view flatten squeeze unflatten view_as reshape_as", shaped),
    **_named("expand expand_as", expanded),
    **_named("new_zeros new_ones new_full new_empty", made_anew),
    **_named("repeat", repeated_values),
    **_named("numpy_T t", axes_reversed),
    **_named("matmul bmm mm", matrix_product),
    **_named("addmm", added_product),
    **_named("einsum", summed_by_letters),
    **_named("conv1d", with_joined_rows(3)),
    **_named("conv2d adaptive_avg_pool2d avg_pool2d max_pool2d im2col pixel_shuffle", with_joined_rows(4)),
    **_named(
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa", with_joined_rows(4)
    ),
    **_named("upsample_nearest2d pixel_unshuffle", with_joined_rows(4)),
    **_named("conv3d", with_joined_rows(5)),
    **_named("group_norm batch_norm", normalised),
    **_named("grid_sampler", sampled),
    **_named("scaled_dot_product_attention", attended_within),
    **_named("index", picked),
    **_named("index_put index_put_", put),
}
