"""Calls of sizes that no capture saw, at which an export is compared. The capture is first compared with eager code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from peftfx.bases.config_fields import length_of
from peftfx.errors import PeftfxError, raise_if_memory_is_out, warn
from peftfx.export.verification.captured import eager_forward, gives_nan, hold_call, tensors_in
from peftfx.export.verification.cases import (
    COUNT,
    FEW,
    ONE,
    PROBE_SIZES,
    case_of,
    is_heavy,
    is_large,
    sizes_beside,
    sizes_of_one,
    varied_sizes,
    with_few_rows,
    with_trained_tokens,
)
from peftfx.export.verification.comparison import VerificationError, short_shapes
from peftfx.export.verification.eager.kept_state import StateError
from peftfx.export.verification.sizes.limits import EVERY, Sizes
from peftfx.generation.invocation import invoked
from peftfx.graph.conditions import Condition, completed
from peftfx.graph.graph import Graph, TensorSpec
from peftfx.model.adapted import AdaptedModel
from peftfx.telling import tell_share
from peftfx.views.arguments import named_tensors, nested
from peftfx.views.view import LONG_TEXT, Axes, LastRun, RunView, View, as_captured

Accepts = Callable[[dict[str, Tensor]], object]
"""A function that runs the model on the inputs of a call, and returns what it gives.

It raises an error if the model does not take their sizes.
"""


def probes(
    adapted: AdaptedModel,
    specs: Sequence[TensorSpec],
    example: Mapping[str, object],
    accepts: Accepts | None = None,
    sizes: Sizes = EVERY,
) -> list[dict[str, Tensor]]:
    """Make inputs by name, at several sizes that the model takes.

    One call has the example's sizes, one has a batch and a text of size 1, one a size of 1 along every axis, and some
    are at the bounds of `sizes`. The last row of a batch is padded. A size at which the model's own code gives NaN, as
    the deviation of one value does, is left out with a warning, unless it is the example's.

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
    runs = accepts or functools.partial(_by_own_code, adapted, example)
    found: list[dict[str, Tensor]] = []
    nowhere: list[str] = []  #: sizes at which the model gives no numbers
    refusal: Exception | None = None
    captured = adapted.graphs.captured(example, adapted.entry())
    own = captured.sizes_of(named_tensors(example))
    tried, count = _tried(own, captured.conditions, sizes, large=is_large(adapted.base), heavy=is_heavy(captured))
    for wanted, case in _cases(adapted, specs, example, captured, tried, sizes):
        try:
            answer = runs(case)
        except (VerificationError, StateError):
            raise
        except Exception as error:  # a model's code raises various errors for a size that it does not take
            raise_if_memory_is_out(error)
            refusal = error
            continue
        if wanted is not own and any(gives_nan(value, case) for value in tensors_in(answer)):
            refusal = ValueError(f"its own code gives NaN at {_shapes(case)}")
            nowhere.append(_shapes(case))
            continue
        if accepts is None:
            hold_call(captured, case, answer)
        found.append(case)
        tell_share(f"{len(found)} of {count} calls by the model's own code", len(found) / (2 * count))
        if len(found) == count:
            break
    if nowhere and found:
        warn(f"the export is not compared at {nowhere[0]}: the model's own code gives NaN there")
    if not found:
        what = f"the model takes none of the sizes tried: {str(refusal).strip().splitlines()[0]}"
        hint = "in Python, pass inputs=... of a call that it takes"
        raise PeftfxError(what, type(adapted.base).__name__, hint) from refusal
    return found


def _by_own_code(adapted: AdaptedModel, example: Mapping[str, object], case: Mapping[str, Tensor]) -> object:
    with as_captured(adapted.base):
        return eager_forward(adapted, nested(case, example))


def _tried(
    own: Mapping[str, int], relations: Sequence[Condition], sizes: Sizes, *, large: bool, heavy: bool
) -> tuple[list[Mapping[str, int]], int]:
    """Return the sizes to try in their order, and how many calls are wanted. Of large models and heavy calls: fewer.

    Args:
        own: the example's sizes.
        relations: the conditions of the captured graph.
        sizes: the sizes at which the export is right.
        large: whether the model is large.
        heavy: whether a call of the example's sizes is heavy.
    """
    varied = (*varied_sizes(own, relations), *sizes_of_one(own, relations))
    first = [*([] if large or heavy else [own]), ONE, *sizes.probes, *varied]
    few = FEW if large or heavy else ()
    tried = [*first, *few, *PROBE_SIZES, *sizes_beside(own)]
    if heavy:
        return with_few_rows(tried, own), len(with_few_rows([*first, *few], own))
    return tried, len(first) + (len(few) or COUNT)


def _cases(
    adapted: AdaptedModel,
    specs: Sequence[TensorSpec],
    example: Mapping[str, object],
    captured: Graph,
    tried: Sequence[Mapping[str, int]],
    sizes: Sizes,
) -> Iterator[tuple[Mapping[str, int], dict[str, Tensor]]]:
    """Yield the tried sizes at which the export has to be right, with inputs of these sizes."""
    for seed, wanted in enumerate(tried):
        whole = completed(captured.conditions, wanted)
        if min(whole.values(), default=1) < 1:
            continue
        case = with_trained_tokens(case_of(adapted, specs, example, whole, seed), adapted, seed)
        case = invoked(case, adapted.invocations, seed)
        if sizes.allow(captured.sizes_of(case)) and sizes.serve(case):
            yield wanted, case


def _shapes(case: Mapping[str, Tensor]) -> str:
    shapes = short_shapes({name: tuple(value.shape) for name, value in case.items()})
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


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
        made = with_trained_tokens(view.inputs(adapted.base, sizes=wanted, seed=seed), adapted, seed, ends=True)
        if sizes.allow(_named_sizes(view.axes, made)) and sizes.serve(made):
            cases.append(view.with_past(adapted.base, made, run, seed))
    return cases


def _named_sizes(axes: Axes, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    pairs = (zip(axes.get(name, ()), value.shape, strict=False) for name, value in inputs.items())
    return {axis: size for pair in pairs for axis, size in pair if axis is not None}


def trials_of(adapted: AdaptedModel, view: View) -> Sequence[Mapping[str, int]]:
    """Return the sizes at which a view is compared. A large model has fewer, and no long text.

    Where the config says how many tokens the model takes, a long text has at most half of them: prompts may be there.
    """
    if is_large(adapted.base):
        return view.trials[::2]
    most = length_of(getattr(adapted.base, "config", None))
    if most is None:
        return view.trials
    long = min(LONG_TEXT, max(most // 2, 1))
    return [{axis: long if size is LONG_TEXT else size for axis, size in own.items()} for own in view.trials]
