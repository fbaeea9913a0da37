"""A trace of a method's function serves all sizes, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch
from support.adapted import randomise
from torch import Tensor, nn
from torch._decomp.decompositions import should_fold
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

import peftfx
from peftfx import PeftfxError
from peftfx.graph.trace import _always, _binds, asked_of_sizes, splits, trace


@pytest.fixture
def rows() -> Tensor:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    free = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])  # type: ignore[list-item, var-annotated]
    return mode.from_tensor(torch.zeros(6, 4), symbolic_context=free)


def test_a_branch_on_a_free_size_is_refused(rows: Tensor) -> None:
    with pytest.raises(PeftfxError, match="branches on a shape"):
        trace(lambda x: x * 2 if x.shape[0] == 6 else x, [rows], "f", "here")


def test_a_statement_that_is_true_for_all_sizes_is_no_branch(rows: Tensor) -> None:
    """In which order torch simplifies one, and so whether it asks at all, depends on Python's hash seed."""
    size = rows.shape[0].node.expr  # type: ignore[attr-defined]
    columns, ranges = 32 * Max(1, FloorDiv(size + 5, 7)), {size: ValueRanges(2, int_oo)}
    assert _always(sympy.Eq(Min(32, columns), 32), ranges)
    assert not _always(sympy.Eq(Min(32, columns), 30), ranges)
    assert _always(sympy.Eq(size * Min(32, 32 * size), 32 * size), ranges)
    assert not _always(sympy.Eq(size * Min(320, 32 * size), 32 * size), ranges)
    assert _always(sympy.Eq(Min(8 * size + 8, 32 * size + 32), 8 * size + 8), ranges)
    assert not _always(sympy.Eq(Min(8 * size + 800, 32 * size), 8 * size + 800), ranges)
    assert not _always(sympy.Eq(size, 6), ranges)
    windows = FloorDiv(size + 5, 7)
    assert _always(sympy.Eq(Min(4 * size * Max(1, windows), 4 * Max(1, windows)), 4 * windows), ranges)
    assert not _always(sympy.Eq(Min(4 * size * windows, 12 * windows), 12 * windows), ranges)
    assert not _always(sympy.Eq(Max(2, windows), windows), ranges)
    assert not _always(sympy.Ne(size * Max(0, windows - size), 0), ranges)  # which is no number of times 0


def test_a_statement_that_is_true_for_large_sizes_splits_nothing(rows: Tensor) -> None:
    with asked_of_sizes([rows]) as asked:
        assert rows.shape[0] % 4 == 2
    (guard,) = asked
    assert splits(asked) == guard.expr
    size, other = sympy.symbols("s1 s2", integer=True)
    for expr, axes, found in (
        (sympy.Ne(size, 1), {}, False),
        (sympy.Ne(size + other, 1), {}, False),
        (FloorDiv(size - 5, 4) > 1, {}, False),
        (size < 100, {}, False),
        (sympy.Ne(Mod(size, 4), 0), {}, True),
        (sympy.Eq(Mod(68 * size, other), 0), {}, True),
        (sympy.Eq(Mod(68 * size, other), 0), {"s1": "batch", "s2": "batch"}, False),
        (sympy.Eq(size, 7), {}, True),
    ):
        assert (splits([guard._replace(expr=expr)], axes) is not None) == found, expr


def test_torchs_choice_of_a_kernel_for_a_product_by_strides_is_no_branch() -> None:
    """Torch asks it inside a generator expression, which has no name of its own."""
    mode, free = FakeTensorMode(shape_env=ShapeEnv()), StatelessSymbolicContext([DimDynamic.DYNAMIC] * 3)  # type: ignore[list-item, var-annotated]
    rows, tokens, stride = mode.from_tensor(torch.zeros(3, 6, 24), symbolic_context=free).shape
    with mode:
        x, factor = torch.empty_strided((rows, tokens, 4), (stride, 4, 1)), torch.zeros(4, 2)
    with asked_of_sizes([x]) as asked:
        assert should_fold(x, factor, is_out=False)
    assert asked
    assert not any(map(_binds, asked))


def test_a_product_with_the_smaller_of_two_sizes_is_traced_for_all() -> None:
    """Torch's rule of the product asks whether the rows may be folded as they lie: the example's two sizes are near."""

    class Shorter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            n = min(x.shape[1], y.shape[1])
            return self.out(self.inner(x[:, :n]) * y[:, :n])

    inputs = {"x": torch.randn(2, 5, 4), "y": torch.randn(2, 7, 4)}
    adapted = peftfx.transform(Shorter(), peftfx.LoRA(r=2, target="all-linear"), inputs=inputs, road="modules").eval()
    randomise(adapted)
    for n, m in ((7, 5), (4, 4), (3, 9)):
        x, y = torch.randn(3, n, 4), torch.randn(3, m, 4)
        torch.testing.assert_close(adapted.graph(inputs)(x=x, y=y), adapted(x=x, y=y))


class ByRow(nn.Module):
    """Layers that see one row at a time, by a transform of `torch.func`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.down(torch.tanh(self.up(row))))(x)


@pytest.mark.parametrize("merge", [True, False])
def test_code_under_vmap_is_trained_by_its_modules_and_refused_by_name_in_an_export(
    merge: bool, tmp_path: Path
) -> None:
    x, model = torch.randn(3, 4), ByRow().eval()
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target="mlp", init_lora_weights=False), inputs={"x": x})
    assert adapted.road == "modules"
    assert not torch.allclose(adapted(x=x), model(x))
    with pytest.raises(PeftfxError, match=r"inside torch\.vmap"):
        adapted.export(tmp_path / "out", merge=merge)
    adapted.remove()
    with pytest.raises(PeftfxError, match=r"inside torch\.vmap"):
        peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x})
    assert not list(tmp_path.iterdir())
