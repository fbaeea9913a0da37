"""transformers' pipelines of images over exports: features of a model without a head, and depth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from support.command import Result, assert_refused

from peftfx import runtime

Run = Callable[..., Result]
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
DPT = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}


def exported(model: hf.PreTrainedModel, root: Path, peftfx: Run) -> Path:
    model.save_pretrained(root / "base")
    hf.DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "base")
    done = peftfx("export", "--base", root / "base", "--output", root / "out", "--quiet")
    assert done.code == 0, done.err
    return root / "out"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_model_of_images_without_a_head_gives_features(picture: Path, tmp_path: Path, peftfx: Run) -> None:
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**VIT, num_hidden_layers=1)).eval()
    out = exported(model, tmp_path, peftfx)
    theirs = hf.pipeline("image-feature-extraction", model=str(tmp_path / "base"), device="cpu")
    want = np.array(theirs(str(picture)))
    (line,) = peftfx("run", out, "--image", picture).out.splitlines()
    np.testing.assert_allclose(np.array(json.loads(line)), want, atol=1e-4)
    np.testing.assert_allclose(np.array(runtime.pipeline(out)(str(picture))), want, atol=1e-4)
    assert_refused(peftfx("run", out, "--text", "one"), "takes images, not texts")


def test_depth_needs_no_tokenizer(picture: Path, tmp_path: Path, peftfx: Run) -> None:
    torch.manual_seed(0)
    out = exported(hf.DPTForDepthEstimation(hf.DPTConfig(**VIT, num_hidden_layers=4, **DPT)).eval(), tmp_path, peftfx)
    theirs = hf.pipeline("depth-estimation", model=str(tmp_path / "base"), device="cpu")
    want, got = (pipeline(str(picture))["predicted_depth"] for pipeline in (theirs, runtime.pipeline(out)))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
