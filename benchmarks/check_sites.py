"""Whether a merged export holds what HF PEFT's arithmetic gives, at sites drawn at random: `W + alpha / r * (B @ A)`.

    python benchmarks/check_sites.py CHECKPOINT/base CHECKPOINT/adapter EXPORT --count 20

Computed in float32 from the files and rounded once. Products of float32 depend on the order of their sums, so a value
may be its neighbour; it is said how many are not the very same. Weights without an adapter have to be the very same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors import safe_open
from torch import Tensor

from peftfx.export.metadata import PERM

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Found:
    """One weight of an export against what it should be.

    Attributes:
        name: of the weight.
        adapted: whether a LoRA is on it.
        same: the part of its values that are the very same.
        steps: the largest difference, in steps between floating-point numbers of the size of the largest value.
    """

    name: str
    adapted: bool
    same: float
    steps: float


class Files:
    """The tensors of the safetensors files in a directory, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._files = [safe_open(path, "pt") for path in sorted(directory.glob("*.safetensors"))]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)


def check(base: Path, adapter: Path, export: Path, count: int, seed: int = 0) -> list[Found]:
    """Compare `count` weights that a LoRA is on, and as many that none is on, or all where there are fewer."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    bases, adapters = Files(base), Files(adapter)
    values = ir.load(export / "model.onnx").graph.initializers
    named = [name for name in values if name in bases]
    adapted = [n for n in named if _factor(n, "A") in adapters]
    when = random.Random(seed)
    found = []
    for names in (adapted, [n for n in named if n not in adapted]):
        for name in when.sample(sorted(names), min(count, len(names))):
            want = bases[name].float()
            if name in adapted:
                a, b = (adapters[_factor(name, x)].float() for x in "AB")
                want += (b @ a) * (config["lora_alpha"] / config["r"])
            found.append(_compare(name, want, values[name], name in adapted))
    return found


def _factor(name: str, factor: str) -> str:
    return f"{PREFIX}{name.removesuffix('.weight')}.lora_{factor}.weight"


def _compare(name: str, want: Tensor, value: ir.Value, adapted: bool) -> Found:
    assert value.const_value is not None
    perm = value.metadata_props.get(PERM)
    if perm is not None:  # stored as the graph reads it
        want = want.permute([int(axis) for axis in perm.split()])
    got = torch.from_numpy(value.const_value.numpy().copy())
    if got.shape != want.shape:
        raise ValueError(f"{name} has the shape {list(got.shape)}, not {list(want.shape)}")
    want = want.to(got.dtype)
    step = torch.finfo(got.dtype).eps * float(want.abs().max())
    error = float((got.float() - want.float()).abs().max()) if got.numel() else 0.0
    return Found(name, adapted, float((got == want).float().mean()), error / step)


def right(found: Sequence[Found], steps: float = 1.0) -> bool:
    """Whether all are: to the very value without an adapter, and to `steps` with one."""
    return bool(found) and all(f.steps <= steps if f.adapted else f.same == 1 for f in found)


def main() -> int:
    """Check, print what was found, and return 1 where a weight is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "export"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = check(args.base, args.adapter, args.export, args.count, args.seed)
    print(summary(found))
    return 0 if right(found) else 1


def summary(found: Sequence[Found]) -> str:
    """What was found, in three lines."""
    lines: list[str] = []
    groups: Mapping[str, list[Found]] = {
        "merged weights": [f for f in found if f.adapted],
        "weights without an adapter": [f for f in found if not f.adapted],
    }
    for title, group in groups.items():
        if group:
            least, steps = min(f.same for f in group), max(f.steps for f in group)
            lines.append(
                f"{len(group)} {title}: {least:.2%} of values or more the very same, {steps:.2f} steps at most"
            )
    return "\n".join([*lines, "right" if right(found) else "WRONG"])


if __name__ == "__main__":
    sys.exit(main())
