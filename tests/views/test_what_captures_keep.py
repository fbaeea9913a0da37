"""What a capture keeps of a model's code: gradients beside regions without any, and attributes of tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.views.dry_run import fake_run

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


class Chosen(nn.Module):
    """Code that picks features by a layer under `no_grad`, which casts its input to the dtype that it has."""

    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.pick, self.second, self.cast = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4), cast

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        with torch.no_grad():
            chosen = self.pick(self.cast(h)).topk(4, -1).indices
        return self.second(h * torch.zeros_like(h).scatter(-1, chosen, 1.0))


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda h: h.to(torch.float32),
    "twice": lambda h: h.float().to(h.device, non_blocking=True).contiguous(),
    "copied": lambda h: h.to(torch.float32, copy=True),
    "doubled": lambda h: h.double().float(),
    "viewed": lambda h: h.view(h.shape),
}


@pytest.mark.parametrize("cast", CASTS)
def test_gradients_pass_by_a_region_without_gradients(cast: str) -> None:
    """A cast that changes nothing gives its input back, so the region's cast was read behind it, without a gradient."""
    torch.manual_seed(0)
    model = Chosen(CASTS[cast])
    rule, example = peftfx.LoRA(r=2, target_modules=["first", "pick", "second"], init_lora_weights=False), {"x": X}
    found = []
    for road in ("modules", "graph"):
        ours = peftfx.transform(copy.deepcopy(model), rule, inputs=example, road=road, seed=3)
        ours(X[:3]).square().sum().backward()
        found.append({name: p.grad for name, p in ours.adapters.named_parameters()})
    assert [name for name, grad in found[0].items() if grad is None] == [n for n in found[0] if ".pick." in n]
    torch.testing.assert_close(found[1], found[0])


class Noted(nn.Module):
    """A layer whose code reads what is noted on its tensors."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("table", torch.ones(8))
        self.inner.weight.gain = 1.5  # type: ignore[assignment]
        self.inner.weight.mask = torch.arange(8.0) / (3 + number % 2)  # type: ignore[assignment]
        self.table.kind = "half"  # type: ignore[attr-defined]
        if number > 2:
            self.inner.weight.late = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) * self.inner.weight.gain * self.inner.weight.mask  # type: ignore[operator]
        y = y * (3.0 if getattr(self.inner.weight, "late", False) else 1.0)
        return torch.tanh(x + y * (0.5 if self.table.kind == "half" else 1.0) * self.table)  # type: ignore[attr-defined]


def test_attributes_of_parameters_and_buffers_are_read_in_a_capture() -> None:
    """They were lost: of `getattr` with a default, and of an attribute that later layers have, without a word."""
    layers = nn.Sequential(*map(Noted, range(6))).eval()
    graph = peftfx.capture(layers, {"input": torch.ones(2, 8)})
    for rows in (2, 5):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(graph.run(x)[0], layers(x))
    with pytest.raises(AttributeError, match="gain"):
        torch.ones(2).gain  # type: ignore[attr-defined]  # noqa: B018


class Repacking(nn.Linear):
    """A layer whose code puts its weight into another form when it first runs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.data
        self.weight.data = weight.flatten()
        return x @ weight.T


def test_a_parameter_whose_data_the_code_replaces_has_its_own_after_a_run_on_fake_tensors() -> None:
    layer = Repacking(3, 2, bias=False)
    memory = layer.weight.data_ptr()
    with fake_run(layer) as fake:
        layer(fake(torch.ones(4, 3)))
    assert layer.weight.shape == (2, 3)
    assert layer.weight.data_ptr() == memory


class _Owned(OrderedDict[str, nn.Parameter | None]):
    """A dict of parameters as DeepSpeed puts them into modules: it has no copy."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner._parameters)
        self.owner = owner


def test_dicts_of_a_class_of_their_own_are_restored() -> None:
    model = nn.Linear(4, 4)
    model._parameters = _Owned(model)
    before = dict(model._parameters)
    with fake_run(model):
        model.further = nn.Parameter(torch.ones(4))
    assert isinstance(model._parameters, _Owned)
    assert dict(model._parameters) == before
