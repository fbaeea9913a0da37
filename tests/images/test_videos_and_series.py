"""Models of videos and of time series need no inputs of the user's, and are exported as `peft` computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.few import but_further
from support.parity import outputs
from torch import nn

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.tasks import task_of
from peftfx.export import OnnxModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FRAMES = {**SIZES, "image_size": 16, "num_frames": 4, "num_labels": 3}
VIDEO = {**SIZES, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 4, "num_labels": 3}
SERIES = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 3, "d_model": 16}
Make = Callable[[], nn.Module]
MODELS: Mapping[str, tuple[Make, tuple[int, ...]]] = {
    "videomae": (
        lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**FRAMES, patch_size=8, tubelet_size=2)),
        (4, 3, 16, 16),
    ),
    "timesformer": (
        lambda: hf.TimesformerForVideoClassification(hf.TimesformerConfig(**FRAMES, patch_size=8)),
        (4, 3, 16, 16),
    ),
    "vjepa2": (
        lambda: hf.VJEPA2ForVideoClassification(
            hf.VJEPA2Config(
                **VIDEO, crop_size=16, frames_per_clip=4, patch_size=8, pred_hidden_size=32, num_pooler_layers=1
            )
        ),
        (4, 3, 16, 16),
    ),
    "patchtst": (
        lambda: hf.PatchTSTForPrediction(
            hf.PatchTSTConfig(**SERIES, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, loss="mse")
        ),
        (16, 3),
    ),
    "patchtsmixer": (
        lambda: hf.PatchTSMixerForPrediction(hf.PatchTSMixerConfig(**SERIES, num_layers=1, loss="mse")),
        (16, 3),
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


@pytest.mark.parametrize("name", but_further({"timesformer", "vjepa2"}, MODELS))
def test_it_is_exported_by_itself_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    base, shape = build(name), MODELS[name][1]
    targets = [p for p, m in base.named_modules() if type(m) is nn.Linear and "predictor" not in p]  # which is not run
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    peftfx.load(build(name), tmp_path / "adapter").export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    (given,) = served.inputs
    for batch in (1, 3):
        inputs = {given: torch.randn(batch, *shape)}
        want = outputs(theirs, inputs)
        for output, value in served(**inputs).items():
            torch.testing.assert_close(value, want[output.removesuffix(".output")], atol=1e-5, rtol=1e-4)


def test_a_video_has_labels_and_a_task() -> None:
    model = build("videomae")
    assert task_of(model) == "video-classification"
    assert model(**example_inputs(model, labels=True)).loss.isfinite()


def test_a_backbone_tells_the_size_of_pictures() -> None:
    backbone = hf.VitPoseBackboneConfig(**SIZES, image_size=[32, 16], patch_size=[8, 8], out_indices=[2])
    model = hf.VitPoseForPoseEstimation(hf.VitPoseConfig(backbone_config=backbone)).eval()
    assert example_inputs(model)["pixel_values"].shape == (2, 3, 32, 16)


def test_a_model_of_several_main_inputs_says_what_it_lacks() -> None:
    class Weaves(hf.ViTModel):
        def forward(self, pixel_values: torch.Tensor, threads: torch.Tensor) -> None: ...

    with torch.device("meta"):
        model = Weaves(hf.ViTConfig(**SIZES))
    with pytest.raises(peftfx.PeftfxError, match="cannot make an example of threads"):
        example_inputs(model)


@pytest.mark.further
def test_a_model_reads_the_tokens_of_its_task_beside_an_image(tmp_path: Path) -> None:
    """OneFormer: the same weights, told by a text which kind of segments is asked for."""
    seeing = {"image_size": 32, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4}
    backbone = hf.SwinConfig(**seeing, patch_size=4, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    wide = dict.fromkeys(("hidden_dim", "conv_dim", "mask_dim", "dim_feedforward", "encoder_feedforward_dim"), 32)
    few = {"encoder_layers": 1, "decoder_layers": 2, "query_dec_layers": 1, "num_queries": 5, "num_labels": 4}
    text = {"text_encoder_width": 32, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 50, "task_seq_len": 9}
    config = hf.OneFormerConfig(backbone_config=backbone, num_attention_heads=2, **wide, **few, **text)
    torch.manual_seed(0)
    base = hf.OneFormerForUniversalSegmentation(config).eval()
    want = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value", "linear1"])).eval()
    randomise(want)
    want.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    model = peftfx.load(hf.OneFormerForUniversalSegmentation(config).eval(), tmp_path / "adapter")
    report = model.export(tmp_path / "out")
    assert list(report.inputs) == ["pixel_values", "task_inputs"]
    served = OnnxModel(tmp_path / "out")
    for batch in (3, 5):  # GroupNorm refuses a single image of one piece
        inputs = example_inputs(model.base, sizes={"batch": batch}, seed=5)
        found = served(**inputs)
        with torch.no_grad():
            expected = want(**inputs)
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


def test_a_model_that_takes_frames_one_by_one_has_pictures() -> None:
    model = hf.XCLIPVisionModel(
        hf.XCLIPVisionConfig(**SIZES, image_size=16, patch_size=8, num_frames=2, mit_num_hidden_layers=1)
    ).eval()
    assert example_inputs(model)["pixel_values"].shape == (2, 3, 16, 16)
