"""Sizes of images: free in a convolutional model, and else fixed, which the report and the file say, or chosen."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import transformers as hf
from every_model.checks import build

import peftfx
from peftfx import PeftfxError
from peftfx.bases.config_fields import special_tokens
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.image_size import image_size_of, write_image_size
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.formats import SIZES_KEY

pytestmark = pytest.mark.further


def lora_of(base: torch.nn.Module) -> peftfx.AdaptedModel:
    adapted = peftfx.transform(base.eval(), peftfx.LoRA(r=2, target="all-linear"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def test_a_convolutional_model_takes_images_of_any_size(tmp_path: Path) -> None:
    """Its config names the size that it was trained at; its code takes others."""
    torch.manual_seed(0)
    config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    adapted = lora_of(hf.ConvNextForImageClassification(config))
    report = adapted.export(tmp_path / "out")
    assert report.inputs == {"pixel_values": ["batch", 3, "height", "width"]}
    assert not [line for line in report.sizes if "captured at" in line]
    served, image = OnnxModel(tmp_path / "out"), torch.randn(3, 3, 48, 61)
    with torch.no_grad():
        torch.testing.assert_close(served(pixel_values=image)["logits"], adapted(image).logits, atol=1e-5, rtol=1e-5)


def vit() -> hf.ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()


def test_a_fixed_size_is_told_in_the_report_and_in_the_file(tmp_path: Path) -> None:
    report = peftfx.export_onnx(vit(), tmp_path / "out")
    assert report.inputs == {"pixel_values": ["batch", 3, 32, 32]}
    (line,) = report.sizes
    assert line.startswith("pixel_values is 32 x 32")
    assert line in str(report)
    assert ir.load(tmp_path / "out" / "model.onnx").metadata_props[SIZES_KEY] == line


@pytest.mark.parametrize(
    ("size", "axes", "given"),
    [((48, 64), [48, 64], [(48, 64)]), ("any", ["height", "width"], [(32, 32), (24, 40), (64, 51)])],
    ids=["one", "any"],
)
def test_a_vit_is_exported_for_another_size_or_any(
    tmp_path: Path, size: tuple[int, int] | str, axes: list[int | str], given: list[tuple[int, int]]
) -> None:
    """Its position embeddings are interpolated by the model's own code."""
    adapted = lora_of(vit())
    report = adapted.export(tmp_path / "out", image_size=size)
    assert report.inputs == {"pixel_values": ["batch", 3, *axes]}
    served = OnnxModel(tmp_path / "out")
    for height, width in given:
        image = torch.randn(2, 3, height, width)
        with torch.no_grad():
            want = adapted(image, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(served(pixel_values=image)["logits"], want, atol=1e-5, rtol=1e-5)


def test_a_classifier_that_hands_the_argument_on_is_exported_for_another_size(tmp_path: Path) -> None:
    """CLIP's classifier has no such argument of its own: its forward takes further ones, and gives them to its ViT."""
    adapted = lora_of(build("image-classification", "clip"))
    adapted.export(tmp_path / "out", image_size=(48, 64))
    image = torch.randn(3, 3, 48, 64)
    with torch.no_grad():
        want = adapted(image, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(OnnxModel(tmp_path / "out")(pixel_values=image)["logits"], want, atol=1e-5, rtol=1e-5)


def test_the_files_beside_the_model_give_images_of_the_chosen_size(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    vit().save_pretrained(base)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(base)
    export_directory(base, out, image_size="48x64")
    classify = peftfx.runtime.pipeline(out)
    assert classify.image_processor.size == {"height": 48, "width": 64}
    assert image_size_of(vit().from_pretrained(base)) == (32, 32)  # the base's own is untouched


@pytest.mark.parametrize(
    ("config", "size", "later"),
    [
        ({"size": 20}, (20, 20), {"size": {"height": 40, "width": 80}}),
        ({"size": {"height": 20, "width": 30}, "do_resize": True}, (20, 30), {"size": {"height": 40, "width": 80}}),
        (
            {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}},
            (20, 20),
            {"crop_size": {"height": 40, "width": 80}, "size": {"shortest_edge": 96}},
        ),
        ({"image_processor": {"crop_size": 16, "do_center_crop": False, "size": [8, 12]}}, (8, 12), None),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "merge_size": 2}, None, None),
        ({"size": "large"}, None, None),
    ],
    ids=["number", "sides", "crop", "no crop", "pixels", "unknown"],
)
def test_the_size_of_a_processor_s_images_is_read_and_written(
    tmp_path: Path, config: dict[str, object], size: tuple[int, int] | None, later: dict[str, object] | None
) -> None:
    model = vit()
    model.config.name_or_path = str(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    assert image_size_of(model) == size
    write_image_size(tmp_path, (40, 80))
    assert later is None or json.loads(file.read_text(encoding="utf-8")) == {**config, **later}
    assert image_size_of(model) == (size and (40, 80))


def test_an_example_has_the_processor_s_size_if_the_config_names_none(tmp_path: Path) -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    hf.ResNetForImageClassification(config).save_pretrained(tmp_path)
    hf.ConvNextImageProcessor(size={"shortest_edge": 40}).save_pretrained(tmp_path)
    model = hf.ResNetForImageClassification.from_pretrained(tmp_path)
    assert example_inputs(model)["pixel_values"].shape == (2, 3, 40, 40)
    assert peftfx.capture(model.eval()).inputs[0].shape == ("batch", 3, "height", "width")


def test_a_size_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    config = hf.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    text = hf.GPT2LMHeadModel(config).eval()
    with pytest.raises(PeftfxError, match="takes no images"):
        peftfx.export_onnx(text, tmp_path / "out", view="forward", image_size=32)
    with pytest.raises(PeftfxError, match="both given"):
        peftfx.export_onnx(vit(), tmp_path / "out", inputs=example_inputs(vit()), image_size=32)
    with pytest.raises(PeftfxError, match="forward view alone"):
        peftfx.export_onnx(text, tmp_path / "out", image_size=32)
    with pytest.raises(PeftfxError, match="fixes the height, here at 32"):
        peftfx.export_onnx(_Squares(vit().config), tmp_path / "out", image_size="any")


class _Squares(hf.ViTForImageClassification):
    """A model whose code takes one height."""

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> object:  # type: ignore[override]
        assert pixel_values.shape[2] == 32
        return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)


def test_random_texts_have_no_image_tokens_whatever_the_config_calls_these() -> None:
    config = build("image-text-to-text", "molmo2").config
    assert "image_token_id" in config.attribute_map
    assert config.image_patch_id in set(special_tokens(config))


class _Windowed(torch.nn.Module):
    """A model of peftfx's users: attention within windows of 4 by 4, and a table of positions."""

    def __init__(self, *, table: bool) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 8, 4, 4)
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
        self.positions = torch.nn.Parameter(torch.randn(64, 8)) if table else None

    def forward(self, photo: torch.Tensor) -> torch.Tensor:
        x = self.patches(photo).permute(0, 2, 3, 1)
        batch, height, width, _ = x.shape
        if self.positions is not None:
            x = (x.reshape(batch, height * width, 8) + self.positions).reshape(x.shape)
        windows = x.reshape(batch, height // 4, 4, width // 4, 4, 8).transpose(2, 3).reshape(batch, -1, 16, 8)
        q, k, v = self.qkv(windows).chunk(3, -1)
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v)).mean((1, 2))


@pytest.mark.parametrize("again", [False, True], ids=["first capture", "captured again"])
@pytest.mark.parametrize(("table", "sides"), [(True, [32, 32]), (False, ["photo.2", "photo.3"])], ids=["one", "many"])
def test_sides_of_an_unknown_model_are_fixed_only_if_its_code_takes_one_size(
    table: bool, sides: list[object], again: bool, tmp_path: Path
) -> None:
    """Free sides of a model with a table of positions ended in torch's words when it was exported."""
    torch.manual_seed(0)
    photo = torch.randn(2, 3, 32, 32)
    model = _Windowed(table=table).eval()
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target="all-linear"), inputs={"photo": photo})
    if again:
        model.patches.note = "a module's state is another one, so its code may be too"
    report = adapted.eval().export(tmp_path / "out")
    assert report.inputs == {"photo": ["batch", 3, *sides]}
    other = torch.randn(3, 3, 32, 32) if table else torch.randn(3, 3, 48, 16)
    with torch.no_grad():
        torch.testing.assert_close(OnnxModel(tmp_path / "out")(photo=other)["output"], adapted(other))


class _Captions(hf.PreTrainedModel):
    """A model of a text and an image, whose config tells no size of images."""

    config_class = hf.PreTrainedConfig

    def __init__(self, *, attends: bool) -> None:
        super().__init__(hf.PreTrainedConfig())
        self.words, self.patches, self.attends = torch.nn.Embedding(9, 8), torch.nn.Conv2d(3, 8, 4, 4), attends

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        seen = self.patches(pixel_values).flatten(2).mT
        if self.attends:
            seen = torch.nn.functional.scaled_dot_product_attention(seen, seen, seen)
        return self.words(input_ids) + seen.mean(1, keepdim=True)


@pytest.mark.parametrize(("attends", "sides"), [(True, (32, 32)), (False, ("height", "width"))])
def test_beside_a_text_sides_are_free_in_convolutional_models_alone(attends: bool, sides: tuple[object, ...]) -> None:
    """What attention over an image made of free sides took Gemma 3n's capture more than 8 minutes."""
    given = {"input_ids": torch.ones(2, 5, dtype=torch.long), "pixel_values": torch.randn(2, 3, 32, 32)}
    graph = peftfx.capture(_Captions(attends=attends).eval(), given)
    assert graph.inputs[1].shape == ("batch", 3, *sides)


class Line(torch.nn.Module):
    """Reads a line of text: its height becomes one, and is squeezed."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.read = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.avg_pool2d(self.look(pixel_values).relu(), (8, 2)).squeeze(2)
        return torch.nn.functional.pad(found, (1, 0)).transpose(1, 2) @ self.read.weight.T + self.read.bias


def test_a_height_that_becomes_one_is_squeezed(tmp_path: Path) -> None:
    """The graph has an axis less, and says for which heights it holds."""
    torch.manual_seed(0)
    base, axes = Line().eval(), {"pixel_values": ("batch", None, "height", "width")}
    graph = peftfx.capture(base, {"pixel_values": torch.randn(2, 3, 8, 16)}, axes=axes)
    heights = [h for h in (7, 8, 15, 16) if all(c.met({"height": h, "width": 6}) for c in graph.conditions)]
    assert heights == [8, 15]
    for height, width in ((8, 16), (11, 22), (15, 7)):
        x = torch.randn(1, 3, height, width)
        torch.testing.assert_close(graph(pixel_values=x), base(x))


_SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
_GRID = {"image_size": 24, "patch_size": 8}
_ASKED = {"interpolate_pos_encoding": True}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (hf.Dinov2WithRegistersModel, {"num_register_tokens": 2}),
        (hf.BeitModel, {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}),
    ],
)
def test_sizes_that_code_makes_whole_numbers_stay_free(
    kind: type[hf.PreTrainedModel], own: dict[str, object], tmp_path: Path
) -> None:
    """Their code gives `torch_int(height // 8)` to `interpolate`."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**_SMALL, **_GRID, **own)).eval()
    report = peftfx.export_onnx(model, tmp_path / "out", image_size="any")
    assert not any("computes something else" in line for line in report.sizes)
    served = peftfx.runtime.load(tmp_path / "out")
    for size in ((24, 24), (32, 40), (17, 56)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            want = model(pixel_values=x, **({} if own.keys() <= {"num_register_tokens"} else _ASKED)).last_hidden_state
        torch.testing.assert_close(served(pixel_values=x).last_hidden_state, want, atol=1e-5, rtol=0)
