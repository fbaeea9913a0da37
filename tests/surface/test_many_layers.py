"""Work on a model of many adapted layers grows with their number, not with its square. Calls are counted, not time."""

from __future__ import annotations

import cProfile
import functools
import pstats
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import peftfx

FEW, MANY = 12, 60
PER_LAYER = 2  #: how often more calls than layers there may be of a function, beyond what its calls for few layers say
OURS = Path(peftfx.__file__).parent


class Tower(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * torch.relu(layer(x))
        return x


def counted(work: Callable[[], object]) -> dict[tuple[str, int, str], int]:
    """How often each function of peftfx, or generator in one, is called or resumed."""
    profile = cProfile.Profile()
    profile.runcall(work)
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return {place: calls[1] for place, calls in found.items() if Path(place[0]).is_relative_to(OURS)}


def all_work(count: int, directory: Path) -> dict[str, Callable[[], object]]:
    x = {"x": torch.randn(3, 4)}
    config = peft.LoraConfig(r=2, target_modules=[f"layers.{i}" for i in range(count)])
    adapted = peftfx.transform(Tower(count), config, inputs=x)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    load = functools.partial(peftfx.load, Tower(count), directory / "adapter", inputs=x)
    return {
        "transform": lambda: peftfx.transform(Tower(count), config, inputs=x),
        "save": lambda: adapted.save_pretrained(directory / "adapter"),
        "load": load,
        "load one more": lambda: adapted.load_adapter(directory / "adapter", "more"),
        "export": lambda: load().export(directory / "export", inputs=x),
        "merge in place": adapted.merge_adapter,
        "take back": adapted.unmerge_adapter,
    }


@pytest.mark.further
def test_no_function_is_called_for_each_pair_of_layers(tmp_path: Path) -> None:
    few, many = ({w: counted(f) for w, f in all_work(n, tmp_path / str(n)).items()} for n in (FEW, MANY))
    for work, found in many.items():
        before = few[work]
        grown = {
            place: (before.get(place, 0), calls)
            for place, calls in found.items()
            if calls > PER_LAYER * MANY + 1.5 * MANY / FEW * before.get(place, 0)
        }
        assert grown == {}, work
