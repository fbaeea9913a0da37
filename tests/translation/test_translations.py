"""What torch's exporter refuses or rounds away is exported as torch computes it, by both roads to ONNX."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.few import but_for
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import LoRA, PeftfxError
from peftfx.export import OnnxModel, to_onnx
from peftfx.export.translation.operators import torchlib
from peftfx.export.writing.weights import save
from peftfx.runtime import load


class Layered(nn.Module):
    """A model with one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)


class Functions(Layered):
    """Functions of a layer's output near zero, and of a mask of integers; two of its outputs are None."""

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, object]:
        y = self.layer(x)
        return {
            "expm1": torch.expm1(1e-4 * y),
            "log1p": torch.log1p(1e-5 * y.abs()),
            "log1p of any": torch.log1p(30 * y.abs() - 0.99),
            "expm1 of any": torch.expm1(10 * y),
            "in place": (1e-4 * y).expm1_(),
            "nothing": None,
            "log_sigmoid": nn.functional.logsigmoid(y + 12),
            "less a mask": y + (1.0 - mask) * -3.0,
            "less a part": y + torch.rsub(mask, 1.5, alpha=2),
            "less ones": y + (1 - mask) * -3.0,
            "floored": y + torch.floor_divide(5 * mask, 2.0),
            "nested": (None, y),
        }


def inputs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "x": torch.randn(rows, 4, generator=generator),
        "mask": torch.randint(0, 2, (rows, 4), generator=generator),
    }


@pytest.mark.parametrize("engine", ["fast", "torch"])
@torch.no_grad()
def test_small_results_keep_their_digits_and_masks_of_integers_are_taken(engine: str, tmp_path: Path) -> None:
    ours = peftfx.transform(Functions().eval(), LoRA(r=2, target="/.*/", init_lora_weights=False), inputs=inputs(2))
    ours.export(tmp_path / "out", engine=engine)
    want = ours(**inputs(5))
    got = peftfx.runtime.load(tmp_path / "out")(**inputs(5))
    flat = [t for t in torch.utils._pytree.tree_leaves(want) if isinstance(t, Tensor)]
    assert len(flat) == len(got) == 11
    for a, (name, b) in zip(flat, got.items(), strict=True):
        torch.testing.assert_close(torch.as_tensor(b), a, rtol=2e-5, atol=0 if name in SMALL else 1e-6, msg=name)


class Squeezes(nn.Module):
    """A number of each row, whose axis a `squeeze` takes that names none; the rows may be one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        return x + y[:, :1].squeeze()[..., None], y[:, None, :, None].squeeze((1, -1)), y.squeeze(-1)


@pytest.mark.parametrize("engine", ["fast", "torch"])
@torch.no_grad()
def test_a_squeeze_takes_the_axes_that_it_took_in_the_capture(engine: str, tmp_path: Path) -> None:
    ours = peftfx.transform(Squeezes().eval(), LoRA(r=2, target="/.*/", init_lora_weights=False), inputs=rows(3))
    ours.export(tmp_path / "out", engine=engine)
    served = peftfx.runtime.load(tmp_path / "out")
    for count in (1, 2, 5):
        for want, got in zip(ours(**rows(count)), served(**rows(count)).values(), strict=True):
            torch.testing.assert_close(torch.as_tensor(got), want)


class Flat(nn.Module):
    """One number for each row, without the axis of the rows where there is one row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze()


@torch.no_grad()
def test_a_squeezed_axis_that_a_graph_cannot_drop_is_refused_and_calls_drop_it(tmp_path: Path) -> None:
    rules = LoRA(r=2, target="/.*/", init_lora_weights=False)
    ours = peftfx.transform(Flat().eval(), rules, inputs=rows(3), road="graph")
    for count in (1, 2, 5):
        assert ours(**rows(count)).shape == ours.base(**rows(count)).shape
    with pytest.raises(PeftfxError, match=r"right only where batch != 1 \[squeeze, in the model\]"):
        ours.export(tmp_path / "out")
    report = ours.export(tmp_path / "out", allow_fixed=True)
    assert any("batch != 1" in line for line in report.sizes)
    want, got = ours(**rows(5)), peftfx.runtime.load(tmp_path / "out")(**rows(5))
    torch.testing.assert_close(torch.as_tensor(next(iter(got.values()))), want)


def rows(count: int) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 4, generator=torch.Generator().manual_seed(count))}


SMALL = ("expm1", "log1p", "in place", "log_sigmoid")


class Parts(nn.Module):
    """Writes sines and cosines into the columns of a new table, as for positions, and numbers into rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rows = torch.arange(x.shape[1])[:, None] / 3
            table = torch.zeros(x.shape[1], 6)
            table[:, 0::2] = torch.sin(rows * torch.arange(3))
            table[:, 1::2] = torch.cos(rows * torch.arange(3))
        y = self.layer(x) + table
        y[:, 0] = 0.0
        y[:, 1:, 2] = y[:, 1:, 3] * 2
        y[:, -1].add_(1.0)
        y += x
        return y


def test_writes_into_parts_of_new_tensors_take_the_fast_road(tmp_path: Path) -> None:
    example = {"x": torch.randn(2, 4, 6)}
    ours = peftfx.transform(Parts().eval(), LoRA(r=2, target="/.*/", init_lora_weights=False), inputs=example)
    assert ours.export(tmp_path / "out").engine == "fast"
    served = peftfx.runtime.load(tmp_path / "out")
    for batch, length in ((2, 4), (1, 2), (3, 9)):
        x = torch.randn(batch, length, 6)
        torch.testing.assert_close(served(x=x)["output"], ours(x=x).detach())


class Ends(nn.Module):
    """The functions of an input as it is, and a layer to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.expm1(x), torch.log1p(x), nn.functional.logsigmoid(x), self.layer(x.sign()[:, None])


@torch.no_grad()
def test_far_from_zero_they_are_torchs_too(tmp_path: Path) -> None:
    ours = peftfx.transform(Ends().eval(), LoRA(r=1, target="/.*/"), inputs={"x": torch.rand(3)})
    ours.export(tmp_path / "out")
    x = torch.tensor([-1e30, -80.0, -1.0, -0.5, 0.0, 1e-20, 1.0, 80.0, 1e30, float("inf")])
    got = peftfx.runtime.load(tmp_path / "out")(x=x)
    for a, b in zip(ours(x=x), got.values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(b), a, rtol=1e-5, atol=0, equal_nan=True)


def test_a_translations_source_is_read_when_its_signature_is_first_asked_for() -> None:
    ours, theirs = torchlib._collect_unread(opset_version=23), torchlib._collect(opset_version=23)
    assert list(ours.functions) == list(theirs.functions)
    pairs = [zip(ours.functions[name], theirs.functions[name], strict=True) for name in theirs.functions]
    late = [(a, b) for pair in pairs for a, b in pair if "signature" not in vars(a)]
    assert len(late) > 400
    for a, b in late[::20]:
        assert repr(a.signature) == repr(b.signature)
        assert "signature" in vars(a)


def test_an_operator_that_is_registered_between_two_exports_is_among_the_composite_ones() -> None:
    with torchlib.collected_once():
        torchlib._known_composites()
    with torch.library._scoped_library("between", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
        assert torch.ops.between.twice.default in torchlib._known_composites()


class Placed(nn.Module):
    """Rows that are written at the places of a mask, with what is there added; the write is in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        y = self.layer(x).clone()
        y[mask, :] = y[mask, :] + rows
        return y


@pytest.mark.parametrize("engine", ["fast", "torch"])
@torch.no_grad()
def test_rows_are_written_at_the_places_of_a_mask_and_none_where_it_has_none(engine: str, tmp_path: Path) -> None:
    def call(places: int) -> dict[str, Tensor]:
        mask = torch.zeros(2, 5, dtype=torch.bool)
        mask.view(-1)[1 : 1 + places] = True
        return {"x": torch.randn(2, 5, 4), "mask": mask, "rows": torch.randn(places, 4)}

    model, axes = Placed().eval(), {"x": (None, None, None), "mask": (None, None), "rows": ("places", None)}
    graph = peftfx.capture(model, call(3), axes=axes)
    save(to_onnx(graph, engine=engine), tmp_path)
    served = OnnxModel(tmp_path)
    for places in (3, 6, 0):
        given = call(places)
        (got,) = served(**given).values()
        torch.testing.assert_close(torch.as_tensor(got), model(**given), rtol=0, atol=1e-6)


class ByLanguage(nn.Module):
    """A layer for the tokens of each language: the rows that a mask reads are changed and written back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, languages: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        for number, layer in enumerate(self.layers):
            mask = languages == number
            made[mask] = layer(x[mask])
        return made


@pytest.mark.parametrize("engine", ["fast", "torch"])
@torch.no_grad()
def test_rows_whose_number_the_values_say_are_written_at_the_places_of_a_mask(engine: str, tmp_path: Path) -> None:
    model = ByLanguage().eval()
    example = {"x": torch.randn(3, 2, 4), "languages": torch.tensor([0, 1, 2])}
    graph = peftfx.capture(model, example, axes={"x": ("batch", "length", None), "languages": ("batch",)})
    save(to_onnx(graph, engine=engine), tmp_path)
    served = OnnxModel(tmp_path)
    for languages in ([0, 1, 2], [2], [1, 1, 1, 1], [0, 2, 2]):  # one row, all rows, and none
        given = {"x": torch.randn(len(languages), 5, 4), "languages": torch.tensor(languages)}
        (got,) = served(**given).values()
        torch.testing.assert_close(torch.as_tensor(got), model(**given), rtol=0, atol=1e-6)


SOLVING = {
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "down_proj"]),
    "OFT": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"]),
    "PSOFT": peft.PsoftConfig(r=4, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("kind", but_for({"BOFT", "PSOFT"}, SOLVING))
def test_equations_between_an_adapters_own_tensors_are_solved_once(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), SOLVING[kind]).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = peftfx.load(ZOO["llama"].build(), tmp_path / "adapter").eval()
    report = ours.export(tmp_path / "out", merge=False, view="forward")
    assert len(report.folded) == 4
    assert not report.merged
    for shape in ((3, 5), (1, 1), (1, 7)):
        ids = torch.randint(3, 20, shape, generator=torch.Generator().manual_seed(shape[1]))
        found = load(tmp_path / "out")(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(torch.as_tensor(found), theirs(input_ids=ids).logits.detach(), atol=1e-4, rtol=0)


class ByIndices(Layered):
    """Reads and writes at indices of 32 bits, which torch takes as they are."""

    def forward(self, x: Tensor, row: Tensor, column: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        written, added = y.clone(), y.clone()
        written[row, column] = 1.5
        added.index_put_((row,), y[row], accumulate=True)
        return {"one": y[row], "two": y[row, column], "second": y[:, column], "written": written, "added": added}


@pytest.mark.parametrize("engine", ["fast", "torch"])
@torch.no_grad()
def test_indices_of_32_bits(engine: str, tmp_path: Path) -> None:
    def call(rows: int, places: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        of = {"dtype": torch.int32, "generator": generator}
        row, column = torch.randint(rows, (places,), **of), torch.randint(5, (places,), **of)  # type: ignore[call-overload]
        return {"x": torch.randn(rows, 5, 4, generator=generator), "row": row, "column": column}

    model = ByIndices().eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs=call(3, 2), engine=engine)
    for rows, places in ((1, 1), (4, 3)):
        inputs = call(rows, places)
        torch.testing.assert_close(OnnxModel(tmp_path / "out")(**inputs), model(**inputs))


class AtPlaces(Layered):
    """Writes rows, or single numbers, at the places of a mask."""

    def forward(self, x: Tensor, ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
        y = self.layer(x).clone()
        y[ids == 7] = self.layer(rows)
        numbers = x[..., 0].clone()
        numbers[ids == 7] = rows[:, 1]
        return {"written": y, "numbers": numbers}


@pytest.mark.parametrize("engine", ["fast", "torch"])
@torch.no_grad()
def test_rows_are_as_many_as_their_places_or_one(engine: str, tmp_path: Path) -> None:
    def call(ids: list[list[int]], rows: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(len(ids), len(ids[0]), 4, generator=generator)
        return {"x": x, "ids": torch.tensor(ids), "rows": torch.randn(rows, 4, generator=generator)}

    model = AtPlaces().eval()
    example = call([[7, 1, 7], [2, 7, 7]], 4)
    peftfx.export_onnx(model, tmp_path / "out", inputs=example, engine=engine)
    served = OnnxModel(tmp_path / "out")
    for inputs in (
        example,
        call([[7, 3, 7, 7]], 3),
        call([[7, 7], [1, 7]], 1),
        call([[5, 5, 5]], 1),
        call([[1, 2]], 0),
    ):
        torch.testing.assert_close(served(**inputs), model(**inputs))
    for wrong in (call([[7, 3, 7]], 3), call([[7, 7, 7]], 2), call([[1, 2, 7]], 0)):
        with pytest.raises(RuntimeError, match="shape mismatch"):
            model(**wrong)
        with pytest.raises(PeftfxError):
            served(**wrong)
