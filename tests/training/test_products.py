"""Products outside of autograd: by oneDNN or by torch's own, they are the same, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peftfx.contract.common.lora import products
from peftfx.contract.common.lora.dora_layer import scaled_linear

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "of some columns": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "of every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "expanded": lambda t: t[:1].expand_as(t),
}
both = pytest.mark.skipif(not products._are_both_there(), reason="this torch has one library of products")


def operations(run: Callable[[], Tensor]) -> tuple[Tensor, set[str]]:
    """What a function gives, and the names of the operations that it runs."""
    with torch.profiler.profile() as profiler:
        found = run()
    return found, {event.key for event in profiler.key_averages()}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small matrices treated as large ones are, on a CPU that is not Intel's."""
    monkeypatch.setattr(products, "_is_of_intel", lambda: False)
    for bound in ("_LARGE", "_FEW", "_MANY"):
        monkeypatch.setattr(products, bound, 1)


@both
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_a_large_product_is_that_of_any_layout(left: str, right: str, rows: int) -> None:
    torch.manual_seed(0)
    x, y = LAYOUTS[left](torch.randn(rows, 17)), LAYOUTS[right](torch.randn(17, 40))
    found, names = operations(lambda: products.fast_product(x, y))
    assert any("mkldnn" in name for name in names)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_a_chained_product_of_pieces_is_that_of_any_layout(
    monkeypatch: pytest.MonkeyPatch, left: str, right: str
) -> None:
    monkeypatch.setattr(products, "_PIECE", 2)
    torch.manual_seed(0)
    x, y, z = torch.randn(17, 3).T, LAYOUTS[left](torch.randn(72, 17)).T, LAYOUTS[right](torch.randn(72, 40))
    found, names = operations(lambda: products.chained_product(x, y, z))
    assert ("aten::bmm" in names) == (torch.get_num_threads() <= 8)
    torch.testing.assert_close(found.double(), x.double() @ y.double() @ z.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 6, 1022, 1024, 1536])
def test_pieces_are_equal_and_large_enough(count: int) -> None:
    pieces = products._pieces(count)
    assert count % pieces == 0
    assert pieces == 1 or count // pieces >= products._PIECE
    assert pieces == {1022: 2, 1024: 4, 1536: 4}.get(count, 1)


@pytest.mark.parametrize("why", ["small", "float64", "switched off", "no rows", "counted", "Intel's"])
def test_other_products_are_torchs_own(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(products, "_is_of_intel", lambda: why == "Intel's")
    if why not in ("small", "no rows"):
        monkeypatch.setattr(products, "_MANY", 1)
    mode = FlopCounterMode(display=False) if why == "counted" else nullcontext()
    dtype = torch.float64 if why == "float64" else torch.float32
    x, y = torch.randn(0 if why == "no rows" else 8, 17, dtype=dtype), torch.randn(17, 40, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=why != "switched off"), mode:
        found, names = operations(lambda: products.fast_product(x, y))
    assert not any("mkldnn" in name for name in names)
    assert torch.equal(found, x @ y)
    if isinstance(mode, FlopCounterMode):
        assert mode.get_total_flops() == 2 * x.numel() * y.shape[1]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("vectors", [2, 80])
def test_doras_layer_has_the_same_gradients_with_them(vectors: int) -> None:
    """In float32, where oneDNN's products run, beside float64, where they do not."""
    torch.manual_seed(0)
    given = [torch.randn(size) for size in ((vectors, 24), (56, 24), (4, 24), (56, 4), (56,))]
    back = torch.randn(vectors, 56)
    found = []
    for dtype in (torch.float32, torch.float64):
        x, weight, a, b, m = (t.to(dtype, copy=True).requires_grad_(k != 1) for k, t in enumerate(given))
        y = scaled_linear(x, weight, None, a, b, m, 2.0)
        found.append([y, *torch.autograd.grad(y, (x, a, b, m), back.to(dtype))])
    for at, exact in zip(*found, strict=True):
        torch.testing.assert_close(at.double(), exact, rtol=1e-4, atol=1e-4)
