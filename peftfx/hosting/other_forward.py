"""A `forward` that other code set on an adapted model: adapters act in the base's modules, or the call is refused.

TRL sets a `forward` that runs the base's backbone and multiplies by the head's weight itself. It does not call the
model's own forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from peftfx.bases.embeddings import output_embeddings
from peftfx.bases.guests import GUESTS
from peftfx.errors import PeftfxError
from peftfx.hosting.call import CURRENT, Keys
from peftfx.hosting.guests import Hosted
from peftfx.hosting.road import GRAPH_ASKED, ModulesRoad
from peftfx.views.arguments import named_arguments


def run_other(
    road: ModulesRoad,
    names: Sequence[str],
    call: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    own: Mapping[str, object] | None,
    given: Mapping[str, Tensor],
) -> tuple[object, bool]:
    """Run a call whose `forward` other code has set, with these adapters in the base's modules.

    Before a soft prompt, the call is run as it is. If it comes to the base's modules without the model's own forward,
    it is run again from the start, as the entry of the prompt runs the base. The prompt is computed where the first run
    ended: other code may have switched autocast on.

    Args:
        road: the adapters in the base's modules.
        names: the names of the adapters that act.
        call: runs the call, with arguments.
        args, kwargs: the arguments.
        own: those of `kwargs` that are the base's; None if only the model's own forward can run these adapters.
        given: the inputs that methods read besides the model's own.

    Returns:
        The output, and whether the model's own forward has run.

    Raises:
        PeftfxError: the call does not run the model's own forward, and an adapter acts where no module of the base
            hosts it.
    """
    hosted = () if road.obstacle(names, dearer=False) else tuple(names)
    entry = None if own is None else road.entry(names)
    if own is None or entry is None:
        with _calling(None if own is None else road.keys(names)):
            output = road.run(hosted, None, args, kwargs if own is None else own, given, call)
            called = CURRENT.called
        if not called:
            refuse_passed_by(road, names, entered=own is not None)
        return output, called
    virtual = None
    try:
        with _calling(None), _watching(road.base, lambda: road.virtual(names, entry)):
            output = road.run(hosted, None, args, kwargs, given, call)
            if CURRENT.called:
                return output, True
    except _PassedBy as passed:
        virtual = passed.virtual
    named = {**named_arguments(road.base, args, {}), **own}
    with _calling(road.keys(names)):
        named = {name: value for name, value in named.items() if value is not None}
        output = road.run(hosted, entry, (), named, given, call, virtual)
    refuse_passed_by(road, names, entered=True)
    return output, False


class _PassedBy(BaseException):
    """What ends a call that comes to the base's modules without the model's own forward. No `except` of other code
    should take it for an error."""

    def __init__(self, virtual: Tensor) -> None:
        super().__init__()
        self.virtual = virtual


@contextmanager
def _calling(entered: Keys | None) -> Iterator[None]:
    """Record in `CURRENT.called` whether the model's own forward runs, until the `with` block ends."""
    before = CURRENT.called, CURRENT.entered
    CURRENT.called, CURRENT.entered = False, entered
    try:
        yield
    finally:
        CURRENT.called, CURRENT.entered = before


@contextmanager
def _watching(base: nn.Module, virtual: Callable[[], Tensor]) -> Iterator[None]:
    """End a call of this thread where it comes to the base, or to a part of it, without the model's own forward."""
    thread = threading.get_ident()

    def end(module: nn.Module, args: object) -> None:
        if threading.get_ident() == thread and not CURRENT.called:
            raise _PassedBy(virtual())

    with ExitStack() as hooks:
        for module in (base, *base.children()):
            hooks.enter_context(module.register_forward_pre_hook(end, prepend=True))
        yield


def refuse_passed_by(road: ModulesRoad, names: Sequence[str], *, entered: bool) -> None:
    """Refuse a forward that other code set, which does not run the model's own, if an adapter cannot act there.

    Args:
        road: the adapters in the base's modules.
        names: the names of the adapters that act.
        entered: whether the adapters act in the base's modules, also ahead of them.

    Raises:
        PeftfxError: an adapter would be skipped.
    """
    reason = road.obstacle(names, dearer=False)
    hint = "use a trainer that calls the model's own forward, as transformers.Trainer, or adapt other modules"
    if not reason and not entered and road.entry(names) is not None:
        reason = "a soft prompt acts ahead of the base's modules, where calls run a graph"
        hint = _OTHER_ROAD
    if reason == GRAPH_ASKED:
        hint = _OTHER_ROAD
    if not reason and _acts_at_head(road, names):
        reason = "an adapter acts at the output embedding, whose weight that forward may read by itself"
    if reason:
        what = f"other code has set a forward on the model, which does not run the model's own, and {reason}"
        raise PeftfxError(what, "forward", hint)


_OTHER_ROAD = 'take the other road: peftfx.transform(..., road="modules")'


def _acts_at_head(road: ModulesRoad, names: Sequence[str]) -> bool:
    head = output_embeddings(road.base)
    guests = None if head is None else head._modules.get(GUESTS)
    return isinstance(guests, Hosted) and any(key in guests.weights for key in road.keys(names))
