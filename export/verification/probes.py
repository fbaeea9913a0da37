"""Calls of sizes that no capture saw, at which an export is compared. The capture is first compared with eager code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.eager.kept_state import StateError, state_kept
from peftfx.export.verification.sizes.limits import EVERY, Sizes
from peftfx.generation.invocation import invoked
from peftfx.graph.conditions import Condition, completed
from peftfx.graph.graph import Graph, TensorSpec, path_name
from peftfx.model.adapted import AdaptedModel
from peftfx.telling import tell_share
from peftfx.views.arguments import nested
from peftfx.views.entry import Entry, forward
from peftfx.views.view import Axes, LastRun, RunView, View, without_cache

PROBE_SIZES: Sequence[Mapping[str, int]] = (
    {"batch": 1, "sequence": 9, "decoder_sequence": 4},
    {"batch": 3, "sequence": 5, "decoder_sequence": 8},
    {"batch": 4, "sequence": 12, "decoder_sequence": 6},
    {"batch": 5, "sequence": 8, "decoder_sequence": 3},
    {"batch": 2, "sequence": 16, "decoder_sequence": 7},
)
ONE: Mapping[str, int] = dict.fromkeys(PROBE_SIZES[0], 1)
COUNT = 3  #: how many sizes are compared; the others replace sizes that the model itself refuses
FEW: Sequence[Mapping[str, int]] = (
    {"batch": 1, "sequence": 5, "decoder_sequence": 3},
    {"batch": 3, "sequence": 3, "decoder_sequence": 4},
)  #: for a model that takes about a second for each token
_LARGE = 1 << 30  #: bytes of weights from which a model is large
_TOLERANCE = 1e-4  #: of the captured base compared with the eager base, relative to the largest output


Accepts = Callable[[dict[str, Tensor]], object]
"""A function that runs the model on the inputs of a call. It raises an error if the model does not take their sizes."""


def probes(
    adapted: AdaptedModel,
    specs: Sequence[TensorSpec],
    example: Mapping[str, object],
    accepts: Accepts | None = None,
    sizes: Sizes = EVERY,
) -> list[dict[str, Tensor]]:
    """Make inputs by name, at several sizes that the model takes.

    One call has the example's sizes, one has a batch and a text of size 1, one a size of 1 along every axis, and some
    are at the bounds of `sizes`. The last row of a batch is padded.

    Args:
        adapted: the model.
        specs: the inputs' names, shapes and dtypes.
        example: the keyword arguments of a call.
        accepts: runs the model, and raises an error for a size that it does not take; by default the eager base, with
            which the captured base is then compared.
        sizes: the sizes at which the export is right.

    Raises:
        PeftfxError: the model takes none of the sizes that were tried.
        VerificationError: the captured base differs from the eager base.
    """
    found: list[dict[str, Tensor]] = []
    refusal: Exception | None = None
    large = is_large(adapted.base)
    captured = adapted.graphs.captured(example, adapted.entry())
    own = captured.sizes_of(_tensors(example))
    relations = captured.conditions
    first = [*([] if large else [own]), ONE, *sizes.probes, *_varied(own, relations), *_each_one(own, relations)]
    count = len(first) + (len(FEW) if large else COUNT)
    for seed, wanted in enumerate((*first, *(FEW if large else ()), *PROBE_SIZES, *_beside(own))):
        whole = completed(relations, wanted)
        if min(whole.values(), default=1) < 1:
            continue
        case = invoked(case_of(adapted, specs, example, whole, seed), adapted.invocations, seed)
        if not sizes.allow(captured.sizes_of(case)) or not sizes.serve(case):
            continue
        want = None
        try:
            if accepts is not None:
                accepts(case)
            else:
                with without_cache(adapted.base):
                    want = eager_forward(adapted, nested(case, example))
        except (VerificationError, StateError):
            raise
        except Exception as error:  # a model's code raises various errors for a size that it does not take
            raise_if_memory_is_out(error)
            refusal = error
            continue
        if accepts is None:
            _compare(captured, case, want)
        found.append(case)
        tell_share(f"{len(found)} of {count} calls by the model's own code", len(found) / (2 * count))
        if len(found) == count:
            return found
    if not found:
        what = f"the model takes none of the sizes tried: {str(refusal).strip().splitlines()[0]}"
        raise PeftfxError(what, type(adapted.base).__name__, "pass inputs=... of a call that it takes") from refusal
    return found


def hold_view(adapted: AdaptedModel, view: View, case: dict[str, Tensor]) -> None:
    """Compare the captured base with the eager base in a view, in one call.

    Raises:
        PeftfxError: the eager model refuses the call.
        VerificationError: the captured base differs from the eager base.
    """
    seen, entry = adapted.under_prompt(view)
    captured = adapted.graphs.captured(seen.inputs(adapted.base), entry, seen)
    try:
        with without_cache(adapted.base):
            want = eager_view(seen, entry, adapted.base, case)
    except Exception as error:
        raise_if_memory_is_out(error)
        raise refused(adapted, view, error) from error
    got = captured.run(*(case[spec.name] for spec in captured.inputs))
    for (name, a), b in zip(want.items(), got, strict=True):
        hold(name, view.shown(name, case, a), view.shown(name, case, b), same=a.shape == b.shape)


def refused(adapted: AdaptedModel, view: View, error: Exception) -> PeftfxError:
    """Make the error for a model whose own code does not run in a view."""
    what = f"the model does not run in its {view.name} view: {first_line(error)}"
    return PeftfxError(what, type(adapted.base).__name__, "export its forward view")


def view_cases(adapted: AdaptedModel, view: View, run: RunView, sizes: Sizes = EVERY) -> list[dict[str, Tensor]]:
    """Make inputs of a view at its trial sizes, the example's sizes and the bounds of `sizes`, if `sizes` allows them.

    The inputs continue pasts (key/value caches), which `run` makes by running the model. Views ask for the same run
    again and again, and it is made once.
    """
    cases, run = [], LastRun(run)
    own: Sequence[Mapping[str, int]] = [] if is_large(adapted.base) else [{}]
    wanted_sizes = (*trials_of(adapted, view), *own, *sizes.probes)
    for seed, wanted in enumerate(wanted_sizes, 1):
        tell_share(f"{seed} of {len(wanted_sizes)} calls by the model's own code", seed / (2 * len(wanted_sizes)))
        made = view.inputs(adapted.base, sizes=wanted, seed=seed)
        if sizes.allow(_named_sizes(view.axes, made)) and sizes.serve(made):
            cases.append(view.with_past(adapted.base, made, run, seed))
    return cases


def _named_sizes(axes: Axes, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    pairs = (zip(axes.get(name, ()), value.shape, strict=False) for name, value in inputs.items())
    return {axis: size for pair in pairs for axis, size in pair if axis is not None}


def trials_of(adapted: AdaptedModel, view: View) -> Sequence[Mapping[str, int]]:
    """Return the sizes at which a view is compared. A large model has fewer."""
    return view.trials[::2] if is_large(adapted.base) else view.trials


def is_large(base: nn.Module) -> bool:
    return sum(p.numel() * p.element_size() for p in base.parameters()) > _LARGE


def eager_view(view: View, entry: Entry | None, base: nn.Module, case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the model's own code in a view, with zeros as the soft prompt, and return its outputs."""
    with state_kept(base):
        output = view(base, case) if entry is None else entry(view, base, entry.hole(base), case)
    assert isinstance(output, dict)
    return output


def case_of(
    adapted: AdaptedModel,
    specs: Sequence[TensorSpec],
    example: Mapping[str, object],
    sizes: Mapping[str, int],
    seed: int,
) -> dict[str, Tensor]:
    """Make inputs of these sizes. If the config does not suffice, the example's own inputs are repeated and cut."""
    names = [spec.name for spec in specs]
    sizes = _with_pieces(adapted.base, sizes)
    try:
        made = _made(adapted.base, sizes, seed + 1)
    except PeftfxError:
        made = {}
    if set(made) == set(names):
        case = {spec.name: made[spec.name].to(spec.dtype) for spec in specs}
        if all(spec.accepts(case[spec.name]) and _sized(spec, case[spec.name], sizes) for spec in specs):
            return case
    given = _tensors(example)
    rng = torch.Generator().manual_seed(seed)
    picked: dict[str, Tensor] = {}
    return {spec.name: _resized(given[spec.name], spec.shape, sizes, rng, picked) for spec in specs}


def _made(base: nn.Module, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    text = {name: size for name, size in sizes.items() if name in PROBE_SIZES[0]}
    if "sequence" in text:
        text["sequence"] -= _pieces(base)
    return example_inputs(base, sizes=text, seed=seed)


def _with_pieces(base: nn.Module, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """Return the sizes, with room in the text for all tokens that stand for pieces of an image."""
    least = _pieces(base) + 1
    return {name: max(size, least) if name == "sequence" else size for name, size in sizes.items()}


def _pieces(base: nn.Module) -> int:
    """Return how many tokens of an example's text stand for pieces of its image."""
    try:
        made = example_inputs(base, sizes={"batch": 1, "sequence": 1})
    except PeftfxError:
        return 0
    return made["input_ids"].shape[1] - 1 if "input_ids" in made else 0


def _tensors(example: Mapping[str, object]) -> dict[str, Tensor]:
    leaves, _ = pytree.tree_flatten_with_path(dict(example))
    return {path_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _sized(spec: TensorSpec, value: Tensor, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(str(axis), size) == size for axis, size in zip(spec.shape, value.shape, strict=True))


def _beside(own: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield sizes beside the example's, for a model that takes none of the usual ones, such as one of recordings."""
    yield {**own, "batch": 1}
    yield {axis: size + 3 for axis, size in own.items()}
    yield {axis: 2 * size + 1 for axis, size in own.items()}


def _each_one(own: Mapping[str, int], relations: Sequence[Condition]) -> Iterator[dict[str, int]]:
    """Yield a size of 1 for all axes, if axes without usual sizes are among them."""
    if own.keys() - completed(relations, ONE).keys():
        yield dict.fromkeys(own, 1)


def _varied(own: Mapping[str, int], relations: Sequence[Condition]) -> Iterator[dict[str, int]]:
    """Yield sizes for axes without usual sizes: one and two more than the example's, or what follows from others."""
    free = [axis for axis in own if axis not in completed(relations, PROBE_SIZES[0])]
    for i in (1, 2) if free else ():
        sizes = dict(PROBE_SIZES[i])
        for axis in free:
            sizes = completed(relations, {axis: own[axis] + i, **sizes})
        yield sizes


def _resized(
    value: Tensor,
    axes: Sequence[int | str],
    sizes: Mapping[str, int],
    rng: torch.Generator,
    picked: dict[str, Tensor],
) -> Tensor:
    """Pick places of the example along each axis, in order, and the same in all inputs, so that a token sees itself.

    If each row of a boolean mask shows something, so does each row of the result: attention to nothing has no value.
    """
    shows = value.dtype == torch.bool and value.ndim > 1 and bool(value.any(-1).all())
    for dim, axis in enumerate(axes):
        if isinstance(axis, str) and axis in sizes:
            if axis not in picked:
                picked[axis] = torch.randint(value.shape[dim], (sizes[axis],), generator=rng).sort().values
            value = value.index_select(dim, picked[axis])
    if value.is_floating_point():
        return value + 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float32).to(value.dtype)
    return value | ~value.any(-1, keepdim=True) if shows else value


def eager_forward(adapted: AdaptedModel, call: Mapping[str, object]) -> object:
    """Run the model's own forward, with zeros as the active soft prompt, and return its output."""
    entry, base = adapted.entry(), adapted.base
    with state_kept(base):
        return base(**call) if entry is None else entry(forward, base, entry.hole(base), call)


def _compare(captured: Graph, case: Mapping[str, Tensor], want: object) -> None:
    got = captured.run(*(case[spec.name] for spec in captured.inputs))
    tensors = [(name, b) for name, b in zip(captured.outputs, got, strict=True) if isinstance(b, Tensor)]
    for (name, b), a in zip(tensors, tensors_in(want), strict=True):
        hold(name, a, b, same=a.shape == b.shape)


def tensors_in(output: object) -> list[Tensor]:
    """Return the tensors of a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def hold(name: str, want: Tensor, got: Tensor, *, same: bool) -> None:
    """Compare an output of the captured model with the model's own output, and refuse a difference."""
    error = float((want.float() - got.float()).abs().max()) if same and want.numel() else 0.0
    if not same or error > _TOLERANCE * max(1.0, float(want.float().abs().max()) if want.numel() else 0.0):
        raise VerificationError(f"the captured model differs from the model by {error:.2e}", name, "report this model")
