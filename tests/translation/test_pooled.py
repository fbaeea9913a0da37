"""Pools to a fixed size and sounds of other lengths are torch's at every size, and not at the example's alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import peftfx
from peftfx import PeftfxError
from peftfx.export import to_onnx
from peftfx.export.translation import preparation
from peftfx.export.translation.pooled import _pooled

PICTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "averages": lambda x: functional.adaptive_avg_pool2d(x, (3, 4)),
    "of rows": lambda x: functional.adaptive_avg_pool2d(x, (None, 5)),
    "largest": lambda x: functional.adaptive_max_pool2d(x, (2, 3)),
    "of lines": lambda x: functional.adaptive_max_pool1d(x.flatten(2), 7),
    "area": lambda x: functional.interpolate(x, size=(4, 3), mode="area"),
    "nearest middles": lambda x: functional.interpolate(x, size=(5, 9), mode="nearest-exact"),
    "twice as large": lambda x: functional.interpolate(x, scale_factor=(2, 1.25), mode="nearest-exact"),
    "smaller": lambda x: functional.interpolate(x, scale_factor=0.5, mode="nearest-exact"),
    "sums by a divisor": lambda x: functional.avg_pool2d(x, 3, 2, 1, divisor_override=2),
    "sums of bricks by a divisor": lambda x: functional.avg_pool3d(x[:, None], (2, 3, 1), 1, divisor_override=5),
    "half, or nothing": lambda x: functional.interpolate(x, scale_factor=0.5, mode="area"),
}
SOUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: functional.interpolate(x, scale_factor=2, mode="linear"),
    "a little longer": lambda x: functional.interpolate(x, scale_factor=1.25, mode="linear"),
    "aligned": lambda x: functional.interpolate(x, size=11, mode="linear", align_corners=True),
    "nearest": lambda x: functional.interpolate(x, scale_factor=1.25, mode="nearest"),
    "nearest middles": lambda x: functional.interpolate(x, scale_factor=3, mode="nearest-exact"),
    "area": lambda x: functional.interpolate(x, size=4, mode="area"),
    "largest of the channels": lambda x: functional.adaptive_max_pool1d(x.mT, 2),
}


class Behind(nn.Module):
    """A function of a layer's output."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@torch.no_grad()
def hold(model: Behind, example: Tensor, shapes: list[tuple[int, ...]], directory: Path) -> None:
    model.eval()
    peftfx.export_onnx(model, directory, inputs={"x": example})
    served = peftfx.runtime.load(directory)
    for shape in shapes:
        x = torch.randn(shape)
        (got,) = served(x).values()
        torch.testing.assert_close(torch.as_tensor(got), model(x), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_size(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = [(1, 3, 12, 11), (3, 3, 4, 5), (2, 3, 3, 16), (1, 3, 13, 7)]
    hold(Behind(nn.Conv2d(3, 3, 1), PICTURES[name]), torch.randn(2, 3, 12, 11), shapes, tmp_path / "out")


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_of_every_length(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = [(1, 3, 7), (3, 3, 4), (2, 3, 12), (1, 3, 30)]
    hold(Behind(nn.Conv1d(3, 3, 1), SOUNDS[name]), torch.randn(2, 3, 7), shapes, tmp_path / "out")


def test_a_length_that_is_changed_stays_free_in_the_file(tmp_path: Path) -> None:
    hold(Behind(nn.Conv1d(3, 3, 1), SOUNDS["linear"]), torch.randn(2, 3, 7), [], tmp_path / "out")
    (output,) = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.output
    *_, length = output.type.tensor_type.shape.dim
    assert length.dim_param
    assert not length.HasField("dim_value")


def test_halves_are_summed_in_full() -> None:
    """Three thousand ones are more than float16 can count one by one."""
    pooled = _pooled((2, 2, False), torch.ones(1, 1, 6001, dtype=torch.float16))
    assert torch.equal(pooled, torch.ones(1, 1, 2, dtype=torch.float16))


@pytest.mark.parametrize("engine", ["fast", "torch"])
def test_what_torch_splits_up_by_a_branch_on_a_size_is_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a rewrite of ours, torch's decomposition of a pool is that of the example's size."""
    monkeypatch.setattr(preparation, "pool_any_size", lambda *_: False)
    model = Behind(nn.Conv1d(3, 3, 1), SOUNDS["area"]).eval()
    with pytest.raises(PeftfxError, match=r"would be right only where .*Mod\(x\.2, 4\)"):
        to_onnx(peftfx.capture(model, {"x": torch.randn(2, 3, 7)}), engine=engine)


class InBlocks(nn.Module):
    """A text that is padded to a multiple of 8, and cut to its own length again, as in Longformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        lacks = (8 - x.shape[1] % 8) % 8
        return self.layer(self.layer(functional.pad(x, (0, 0, 0, lacks)))[:, : x.shape[1]])


@pytest.mark.parametrize("engine", ["fast", "torch"])
def test_what_a_program_says_of_its_own_sizes_is_no_branch(engine: str, tmp_path: Path) -> None:
    model = InBlocks().eval()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 11, 4)}, engine=engine)
    for length in (8, 9, 24):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(peftfx.export.OnnxModel(tmp_path / "out")(x=x)["output"], model(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("kernel", "padding"), [(3, "same"), (4, "same"), (4, "valid")])
@torch.no_grad()
def test_a_conv_that_keeps_its_sizes_takes_every_size(kernel: int, padding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, (kernel, 2), dilation=(1, 3), padding=padding)
    hold(Behind(conv, torch.relu), torch.randn(2, 3, 12, 11), [(1, 3, 7, 9), (3, 3, 12, 30)], tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert not any(dim.dim_value == 2 for value in graph.value_info for dim in value.type.tensor_type.shape.dim[:1])


@torch.no_grad()
def test_a_pool_behind_strides_that_leaves_one_value_takes_larger_videos(tmp_path: Path) -> None:
    """That it leaves one is an equality of divisions within divisions, which torch.export does not solve."""
    torch.manual_seed(0)
    halved = [nn.Conv3d(3, 4, 1, stride=2), nn.Conv3d(4, 4, 1, stride=2), nn.MaxPool3d(2)]
    layers = nn.Sequential(*halved, nn.AvgPool3d(2, 1), nn.Conv3d(4, 5, 1))
    shapes = [(1, 3, 17, 24, 40), (3, 3, 33, 20, 16), (1, 3, 16, 16, 16)]
    hold(Behind(layers, lambda x: x.mean((2, 3, 4))), torch.randn(2, 3, 16, 16, 16), shapes, tmp_path / "out")


class OfOneRow(nn.Module):
    """Convs without an axis of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.padded = nn.Conv1d(3, 3, 3, bias=False), nn.Conv1d(3, 3, 4, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.padded(self.conv(x.mean(0)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_conv_of_one_row(tmp_path: Path) -> None:
    hold(Behind(OfOneRow(), torch.relu), torch.randn(2, 3, 11), [(1, 3, 7), (3, 3, 30)], tmp_path / "out")


def test_places_of_largest_values_are_refused(tmp_path: Path) -> None:
    def places(x: Tensor) -> Tensor:
        return functional.adaptive_max_pool2d(x, (2, 3), return_indices=True)[1].float()

    with pytest.raises(PeftfxError, match="adaptive_max_pool2d"):
        hold(Behind(nn.Conv2d(3, 3, 1), places), torch.randn(2, 3, 12, 11), [], tmp_path / "out")
