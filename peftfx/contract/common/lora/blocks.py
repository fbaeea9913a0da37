"""BD-LoRA: a LoRA with a block-diagonal factor (HF PEFT's `BdLoraConfig`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftfx.contract.common.low_rank import A, B
from peftfx.errors import PeftfxError, shown


class DiagonalBlocks(NamedTuple):
    """BD-LoRA: the name of the block-diagonal factor, and its number of blocks, stored one below the other."""

    factor: str
    number: int

    @staticmethod
    def at(config: Mapping[str, object] | None, path: str) -> DiagonalBlocks | None:
        """Read HF PEFT's config for the layer at `path`. A pattern matches anywhere in the path.

        Raises:
            PeftfxError: the config names both factors for the layer, or neither where each layer must have one, or
                `nblocks` is not a whole number of 1 or more.
        """
        if config is None:
            return None
        found = _factors(config, path)
        count = config.get("nblocks", 1)
        if not DiagonalBlocks.allows(config, path):
            what = f"BD-LoRA's patterns name {'both factors' if found else 'no factor'} of this layer"
            raise PeftfxError(what, path, "one of target_modules_bd_a, target_modules_bd_b; or match_strict=False")
        if not isinstance(count, int) or count < 1:
            raise PeftfxError(f"not a number of blocks: {shown(count)}", "use_bdlora: nblocks", "1 or more")
        return DiagonalBlocks(found[0], count) if found else None

    @staticmethod
    def allows(config: Mapping[str, object] | None, path: str) -> bool:
        """Return whether HF PEFT's config lets a layer have a LoRA: it names one factor of it, or may name none."""
        if config is None:
            return True
        found = _factors(config, path)
        return len(found) == 1 or not (found or config.get("match_strict", True))

    def config(self) -> dict[str, object]:
        """Return HF PEFT's config of a layer with these blocks."""
        return {"target_modules_bd_a" if self.factor == A else "target_modules_bd_b": [""], "nblocks": self.number}

    def cut(self, p: dict[str, Tensor], where: str) -> None:
        """Replace the zero factor by its blocks, stored one below the other.

        Raises:
            PeftfxError: the number of blocks does not divide the factor's shape.
        """
        rows, columns = p[self.factor].shape
        if rows % self.number or columns % self.number:
            what = f"{self.number} blocks do not divide a factor of {rows} x {columns}"
            raise PeftfxError(what, where, "a divisor of the rank and of the layer's size as nblocks")
        p[self.factor] = p[self.factor].new_zeros(rows, columns // self.number)

    def set_out(self, blocks: Tensor) -> Tensor:
        """Return the whole factor, with `blocks` on its diagonal and zeros elsewhere."""
        each = blocks.unflatten(0, (self.number, -1))  # [blocks, rows, columns]
        eye = torch.eye(self.number, dtype=blocks.dtype, device=blocks.device)
        return (each[:, :, None] * eye[:, None, :, None]).flatten(2).flatten(0, 1)


def _factors(config: Mapping[str, object], path: str) -> list[str]:
    patterns = {A: config.get("target_modules_bd_a"), B: config.get("target_modules_bd_b")}
    return [factor for factor, given in patterns.items() if any(str(text) in path for text in _listed(given))]


def _listed(given: object) -> Sequence[object]:
    return given if isinstance(given, list | tuple) else ()
