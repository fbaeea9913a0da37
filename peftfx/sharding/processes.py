"""Work that several processes do together: who this process is, waiting for the others, and work of the first alone."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TypeVar

from torch import distributed as dist

from peftfx.errors import PeftfxError

_T = TypeVar("_T")
PATIENCE = datetime.timedelta(seconds=60)  #: how long a process waits for the others to make the same call
_CALLS: dict[str, int] = {}


def rank() -> int:
    """Return the number of this process; 0 if there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def together(what: str) -> None:
    """Wait until every process calls this function for the same work, before the first gathering.

    Raises:
        PeftfxError: another process does not call this function in time; gathering would wait for it for ever.
    """
    call, size = _CALLS.get(what, 0), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    keys = [f"peftfx/{what}/{call}/{number}" for number in range(size)]
    store.set(keys[rank()], "here")
    try:
        store.wait(keys, PATIENCE)
    except RuntimeError:
        late = [number for number, key in enumerate(keys) if not store.check([key])]
        store.delete_key(keys[rank()])
        named = ", ".join(str(number) for number in late)
        said = f"{what}() gathers weights of which each process has a part, and rank {named} has not called it"
        hint = "call it in every process, outside of `if rank == 0`: rank 0 alone writes"
        raise PeftfxError(said, what, hint) from None
    _CALLS[what] = call + 1


def on_first(work: Callable[[], _T]) -> _T:
    """Call `work` in the first process while the others wait; all return its result, or raise its error."""
    told: list[object] = [None, None]
    if rank() == 0:
        try:
            told[0] = work()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[1], Exception):
        raise told[1]
    return told[0]  # type: ignore[return-value]
