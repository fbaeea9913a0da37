"""The gathering of a sharded model: for a method of its own, or as a whole model in files of the first process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError
from peftfx.sharding.fsdp import reshard
from peftfx.sharding.models import is_sharded, unhooked
from peftfx.sharding.parts import full, is_part
from peftfx.sharding.processes import rank, together
from peftfx.sharding.refusals import refuse_other_wrappings
from peftfx.twins.twin import copied


def gathering(model: nn.Module, what: str) -> bool:
    """Prepare a sharded model's weights for gathering; return whether the model is sharded.

    Args:
        model: the model.
        what: the name of the method that every process must call.

    Raises:
        PeftfxError: another process does not call this method.
    """
    refuse_other_wrappings(model)
    if not is_sharded(model):
        return False
    together(what)
    reshard(model)
    return True


def refuse_graph(model: nn.Module, obstacle: str, *, hosted: bool) -> None:
    """Refuse the graph road for a sharded model, because FSDP2 gathers weights only for the calls of modules.

    Args:
        model: the model.
        obstacle: why calls run a graph.
        hosted: whether the modules could run the adapters too, if that was asked for.

    Raises:
        PeftfxError: the model is sharded.
    """
    if is_sharded(model):
        graph = f"calls run a graph, which cannot gather them: {obstacle}"
        what = f"each process has a part of this model's weights, and {graph}"
        if hosted:
            raise PeftfxError(what, "road", 'take the other road: peftfx.transform(..., road="modules")')
        raise PeftfxError(what, "road", "adapt places that modules can host, or train under DDP")


@contextmanager
def whole_base(base: nn.Module) -> Iterator[nn.Module | None]:
    """Yield the base with all of its weights, in memory-mapped files, in the first process; None in the others.

    The weights are gathered one at a time.
    """
    with tempfile.TemporaryDirectory(prefix="peftfx-gathered-") as folder, unhooked(base):
        made: dict[int, Tensor] = {}
        for tensor in _parts(base):
            value = full(tensor)
            if rank() == 0:
                kept = _kept(value, Path(folder) / str(len(made)))
                made[id(tensor)] = nn.Parameter(kept, False) if isinstance(tensor, nn.Parameter) else kept
            del value
        yield copied(base, made) if rank() == 0 else None


def _parts(base: nn.Module) -> list[Tensor]:
    """Return the base's tensors of which each process has a part, each once."""
    held = (t for _, module in own_modules(base) for t in (*module._parameters.values(), *module._buffers.values()))
    return list({id(t): t for t in held if t is not None and is_part(t)}.values())


def _kept(value: Tensor, file: Path) -> Tensor:
    """Write a tensor to a file, and return it as a memory-mapped tensor."""
    value = value.cpu().contiguous()
    value.reshape(-1).view(torch.uint8).numpy().tofile(file)
    return torch.from_file(str(file), shared=False, size=value.numel(), dtype=value.dtype).view(value.shape)


@contextmanager
def gathered_for(model: nn.Module, method: str) -> Iterator[bool]:
    """Let FSDP2 gather what it sharded of `model` itself for a method, as for its forward, until the `with` block ends.

    Yields:
        Whether FSDP2 would not have done so: then the method must be called again, by its name.
    """
    if not (dist.is_available() and dist.is_initialized()) or method in vars(model):
        yield False
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(model, FSDPModule):
        yield False
        return
    register_fsdp_forward_method(model, method)
    try:
        yield True
    finally:
        delattr(model, method)
