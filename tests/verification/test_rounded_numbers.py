"""Numbers of a model's code in half precision: whole ones, tables of them, and masks in float32 beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftfx
from peftfx.export.verification.tolerances.rounded_numbers import with_rounded_numbers
from peftfx.graph.graph import CONSTANTS
from peftfx.views.capture import capture

HALVES = (torch.float16, torch.bfloat16)
#: With whole numbers that bfloat16 lacks; float16 has them.
_WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda h: h * 1001,
    "over": lambda h: h / 1001,
    "plus": lambda h: h * 500 + 1001,
    "power": lambda h: 1001 ** h.clamp(-1, 1),
    "remainder": lambda h: (h * 2000) % 1001,
    "filled": lambda h: torch.full_like(h, 1001) + h,
    "added times": lambda h: torch.add(h, h.abs(), alpha=1001),
}


#: With numbers that neither has.
_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "addcmul": lambda h: torch.addcmul(h, h, h, value=0.37),
    "baddbmm": lambda h: torch.baddbmm(h[:, None], h[:, None], h[:, None] * h[:, :, None], beta=0.37, alpha=0.77),
    "hardtanh": lambda h: F.hardtanh(h, -0.37, 0.77),
    "lerp": lambda h: torch.lerp(h, h * h, 0.37),
    "softplus": lambda h: F.softplus(h, beta=1.37),
}


class Computes(nn.Module):
    """A layer, and what is computed of it, in a dtype."""

    def __init__(self, then: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer, self.then, self.dtype = nn.Linear(8, 8), then, dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.then(h if self.dtype is None else h.to(self.dtype)).to(x.dtype)


@pytest.mark.parametrize("name", _WHOLE)
def test_whole_numbers_are_rounded_as_torch_rounds_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    peftfx.export_onnx(Computes(_WHOLE[name]).eval().bfloat16(), tmp_path / "narrow", inputs={"x": x.bfloat16()})
    mixed = Computes(_WHOLE[name], torch.bfloat16).eval()
    peftfx.export_onnx(mixed, tmp_path / "mixed", inputs={"x": x})
    (found,) = peftfx.export.OnnxModel(tmp_path / "mixed")(x=x).values()
    assert torch.equal(found, mixed(x).detach())


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("name", _NUMBERS)
def test_numbers_are_rounded_where_torch_rounds_them(name: str, kind: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8).to(kind)
    peftfx.export_onnx(Computes(_NUMBERS[name]).eval().to(kind), tmp_path / "out", inputs={"x": x})


def over_a_table(h: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.int64).to(h.dtype)
    return h * 100 / 10000 ** (places / 11)


@pytest.mark.parametrize("kind", HALVES)
def test_a_table_is_rounded_on_the_way_as_torch_rounds_it(kind: torch.dtype, tmp_path: Path) -> None:
    """The export has it as a constant."""
    torch.manual_seed(0)
    x = torch.randn(64, 8).to(kind)
    peftfx.export_onnx(Computes(over_a_table).eval().to(kind), tmp_path / "out", inputs={"x": x})


class Attends(nn.Module):
    """An attention whose mask is in float32, whatever the model is in; one token sees all keys as hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, 2, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        shown = x[..., :1] > 0
        mask = shown.transpose(1, 2).expand(batch, length, length)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, mask.float().masked_fill(~mask, -1e9))
        return y.transpose(1, 2).view(batch, length, 16)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("optimize", ["none", "cpu"])
def test_a_mask_in_float32_stays_so_in_half_precision(kind: torch.dtype, optimize: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attends().eval().to(kind), torch.randn(3, 5, 16).to(kind)
    x[0, :, 0] = -1.0  # every key is hidden: torch takes the mean of all values
    x[1, 2, 0] = 1.0
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x}, optimize=optimize)
    if kind == torch.float16:
        (found,) = peftfx.export.OnnxModel(tmp_path / "out")(x=x).values()
        torch.testing.assert_close(found, model(x).detach(), atol=2e-3, rtol=2e-3)


class Sinusoids(nn.Module):
    """A model that computes its table of positions in each call, as Pegasus-X: by a table in the text's own dtype."""

    def __init__(self, fixed: int | None = None) -> None:
        super().__init__()
        self.embed, self.out, self.fixed = nn.Embedding(20, 8), nn.Linear(8, 3), fixed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        made = self.table(ids.shape[1], x)
        more = made if self.fixed is None else self.table(self.fixed, x).mean(0)
        return self.out(x + made + more)

    def table(self, length: int, x: Tensor) -> Tensor:
        table = torch.zeros((length, 8), dtype=x.dtype)
        steps = torch.exp(torch.arange(4).type_as(x) * -(math.log(10000) / 3))
        table[:, :4] = torch.sin(torch.arange(length)[:, None] * steps)
        table[:, 4:] = torch.cos(torch.arange(length)[:, None] * steps)
        return table


def test_a_table_in_the_dtype_of_a_text_is_rounded_as_the_models_code_rounds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for fixed in (None, 5):  # a table of 5 rows is written into, and is no constant
        model = Sinusoids(fixed).half().eval()
        rounded = with_rounded_numbers(capture(model, {"ids": torch.randint(20, (2, 300))}))
        ids = torch.randint(20, (3, 350))
        torch.testing.assert_close(rounded.run(ids)[0], model(ids), atol=0, rtol=0)
        read = [str(node.target) for node in rounded.nodes() if str(node.target).startswith(f"{CONSTANTS}.table")]
        assert read
        peftfx.export_onnx(model, tmp_path / str(fixed), inputs={"ids": torch.randint(20, (2, 300))})
