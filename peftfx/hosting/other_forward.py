"""A `forward` that other code set on an adapted model: adapters act in the base's modules, or the call is refused.

TRL sets a `forward` that runs the base's backbone and multiplies by the head's weight itself. It does not call the
model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from peftfx.bases.guests import GUESTS
from peftfx.errors import PeftfxError
from peftfx.hosting.call import CURRENT
from peftfx.hosting.guests import Hosted
from peftfx.hosting.road import ModulesRoad
from peftfx.views.arguments import named_arguments


def run_other(
    road: ModulesRoad,
    names: Sequence[str],
    call: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    given: Mapping[str, Tensor],
    *,
    entered: bool,
) -> tuple[object, bool]:
    """Run a call whose `forward` other code has set, with these adapters in the base's modules.

    Args:
        road: the adapters in the base's modules.
        names: the names of the adapters that act.
        call: runs the call, with arguments.
        args, kwargs: the arguments.
        given: the inputs that methods read besides the model's own.
        entered: whether the call gets its arguments as the base's modules get them, with a soft prompt before the text.
            If it runs the model's own forward after all, that changes them no further. Otherwise the own forward does
            all that.

    Returns:
        The output, and whether the model's own forward has run.

    Raises:
        PeftfxError: the call does not run the model's own forward, and an adapter acts where no module of the base
            hosts it.
    """
    before = CURRENT.called, CURRENT.entered
    entry = road.entry(names) if entered else None
    if entry is not None:
        named = {**named_arguments(road.base, args, {}), **kwargs}
        args, kwargs = (), {name: value for name, value in named.items() if value is not None}
    CURRENT.called, CURRENT.entered = False, road.keys(names) if entered else None
    try:
        hosted = () if road.obstacle(names, dearer=False) else names
        output = road.run(hosted, entry, args, kwargs, given, call)
        called = CURRENT.called
    finally:
        CURRENT.called, CURRENT.entered = before
    if not called:
        _refuse_passed_by(road, names, entered)
    return output, called


def _refuse_passed_by(road: ModulesRoad, names: Sequence[str], entered: bool) -> None:
    reason = road.obstacle(names, dearer=False)
    hint = "use a trainer that calls the model's own forward, as transformers.Trainer, or adapt other modules"
    if not reason and not entered and road.entry(names) is not None:
        reason = "a soft prompt acts ahead of the base's modules, where calls run a graph"
        hint = 'take the other road: peftfx.transform(..., road="modules")'
    if not reason and _acts_at_head(road, names):
        reason = "an adapter acts at the output embedding, whose weight that forward may read by itself"
    if reason:
        what = f"a forward that was set on the model does not run the model's own, and {reason}"
        raise PeftfxError(what, "forward", hint)


def _acts_at_head(road: ModulesRoad, names: Sequence[str]) -> bool:
    find = getattr(road.base, "get_output_embeddings", None)
    head = find() if callable(find) else None
    guests = head._modules.get(GUESTS) if isinstance(head, nn.Module) else None
    return isinstance(guests, Hosted) and any(key in guests.weights for key in road.keys(names))
