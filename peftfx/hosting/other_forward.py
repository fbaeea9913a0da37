"""A `forward` that other code set on an adapted model: adapters act in the base's modules, or the call is refused.

TRL sets a `forward` that runs the base's backbone and multiplies by the head's weight itself. It does not call the
model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from peftfx.bases.guests import GUESTS
from peftfx.errors import PeftfxError
from peftfx.hosting.call import CURRENT
from peftfx.hosting.guests import Hosted
from peftfx.hosting.road import ModulesRoad


def run_other(
    road: ModulesRoad, names: Sequence[str], call: Callable[[], object], penalised: Callable[[object], object]
) -> object:
    """Run a call whose `forward` other code has set, with these adapters in the base's modules.

    Args:
        road: the adapters in the base's modules.
        names: the names of the adapters that act.
        call: runs the call.
        penalised: adds the adapters' penalties to an output's loss; only used if the model's own forward has not run.

    Raises:
        PeftfxError: the call does not run the model's own forward, and an adapter acts where no module of the base
            hosts it.
    """
    before, CURRENT.called = CURRENT.called, False
    try:
        with road.acting(() if road.obstacle(names, dearer=False) else names):
            output = call()
        if CURRENT.called:
            return output
    finally:
        CURRENT.called = before
    _refuse_passed_by(road, names)
    return penalised(output)


def _refuse_passed_by(road: ModulesRoad, names: Sequence[str]) -> None:
    reason = road.obstacle(names, dearer=False)
    if not reason and road.entry(names) is not None:
        reason = "a soft prompt acts ahead of the base's modules"
    if not reason and _acts_at_head(road, names):
        reason = "an adapter acts at the output embedding, whose weight that forward may read by itself"
    if reason:
        what = f"a forward that was set on the model does not run the model's own, and {reason}"
        hint = "use a trainer that calls the model's own forward, as transformers.Trainer, or adapt other modules"
        raise PeftfxError(what, "forward", hint)


def _acts_at_head(road: ModulesRoad, names: Sequence[str]) -> bool:
    find = getattr(road.base, "get_output_embeddings", None)
    head = find() if callable(find) else None
    guests = head._modules.get(GUESTS) if isinstance(head, nn.Module) else None
    return isinstance(guests, Hosted) and any(key in guests.weights for key in road.keys(names))
