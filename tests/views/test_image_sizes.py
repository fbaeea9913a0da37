"""Sizes of images: free in a convolutional model, and else fixed, which the report and the file say."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
import transformers as hf

import peftfx
from peftfx.export import OnnxModel
from peftfx.export.metadata import SIZES_KEY


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


def test_a_fixed_size_is_told_in_the_report_and_in_the_file(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = hf.ViTConfig(**sizes, image_size=32, patch_size=8)
    report = peftfx.export_onnx(hf.ViTForImageClassification(config).eval(), tmp_path / "out")
    assert report.inputs == {"pixel_values": ["batch", 3, 32, 32]}
    (line,) = report.sizes
    assert line.startswith("pixel_values is 32 x 32")
    assert line in str(report)
    assert ir.load(tmp_path / "out" / "model.onnx").metadata_props[SIZES_KEY] == line
