"""keeping: inside, a quantised weight is dequantised once, into a file that is mapped, and not by every operator anew.

Mapped files are in no memory but what the kernel can drop. They have no names: whatever ends the process ends them.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peftfx.quantisation.codes import Codes

MOST = 16 << 30  #: bytes that are kept, and never more than half of what is free


@dataclass
class _Kept:
    folder: Path
    left: int
    found: dict[int, tuple[Codes, Tensor]] = field(default_factory=dict)

    def values(self, codes: Codes) -> Tensor:
        if id(codes) in self.found:
            return self.found[id(codes)][1]
        made = codes.dequantise()
        if made.nbytes > self.left or not made.numel():
            return made
        file = self.folder / str(len(self.found))
        mapped = torch.from_file(str(file), shared=True, size=made.numel(), dtype=made.dtype).view(made.shape)
        file.unlink(missing_ok=True)  # the mapping stays
        self.left -= made.nbytes
        self.found[id(codes)] = codes, mapped.copy_(made)  # with the codes: no others can get their number meanwhile
        return mapped


_CURRENT: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def keeping(beside: Path) -> Iterator[None]:
    """Inside, `values_of` keeps what it makes, in files on the disk of this directory, as long as there is room."""
    with tempfile.TemporaryDirectory(prefix="values-", dir=beside) as folder:
        token = _CURRENT.set(_Kept(Path(folder), min(MOST, shutil.disk_usage(folder).free // 2)))
        try:
            yield
        finally:
            _CURRENT.reset(token)


def values_of(codes: Codes) -> Tensor:
    """The float32 weight [out, in] of codes; it may be kept, and is not to be written."""
    kept = _CURRENT.get()
    return codes.dequantise() if kept is None else kept.values(codes)
