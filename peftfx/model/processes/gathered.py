"""Gathered: a model of which each process has a part, as one whole in the first process, its weights in files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError
from peftfx.sharding import full, is_part, is_sharded, rank, refuse_other_wrappings, reshard, together, unhooked
from peftfx.twins.twin import copied


def gathering(model: nn.Module, what: str) -> bool:
    """Get ready to gather a model's weights, if processes have parts of it; returns whether they have.

    Args:
        what: the method that every process is to call.

    Raises:
        PeftfxError: another process does not call it.
    """
    refuse_other_wrappings(model)
    if not is_sharded(model):
        return False
    together(what)
    reshard(model)
    return True


def refuse_graph(model: nn.Module, obstacle: str) -> None:
    """A graph reads weights outside of the modules that FSDP2 gathers them for.

    Raises:
        PeftfxError: processes have parts of the model.
    """
    if is_sharded(model):
        what = f"each process has a part of this model's weights, and calls run a graph, which gathers none: {obstacle}"
        raise PeftfxError(what, "road", "adapt places that modules can host, or train under DDP")


@contextmanager
def whole_base(base: nn.Module) -> Iterator[nn.Module | None]:
    """Inside, in the first process, a base with all of its weights, in memory-mapped files; None in the others.

    Its weights are gathered one at a time.
    """
    with tempfile.TemporaryDirectory(prefix="peftfx-gathered-") as folder, unhooked(base):
        made: dict[int, Tensor] = {}
        for _, module in own_modules(base):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if is_part(tensor) and id(tensor) not in made:
                    assert tensor is not None
                    value = full(tensor)
                    if rank() == 0:
                        kept = _kept(value, Path(folder) / str(len(made)))
                        made[id(tensor)] = nn.Parameter(kept, False) if isinstance(tensor, nn.Parameter) else kept
                    del value
        yield copied(base, made) if rank() == 0 else None


def _kept(value: Tensor, file: Path) -> Tensor:
    """A tensor in a file."""
    value = value.cpu().contiguous()
    value.reshape(-1).view(torch.uint8).numpy().tofile(file)
    return torch.from_file(str(file), shared=False, size=value.numel(), dtype=value.dtype).view(value.shape)
