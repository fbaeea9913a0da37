"""Example recordings have the shape that the model's config, or that of its part that hears, tells."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.sounds.recordings import fitted_shape, recording_shape
from peftfx.export import OnnxModel


@pytest.mark.parametrize(
    ("name", "fields", "shape"),
    [
        ("input_features", {"num_mel_bins": 8, "max_source_positions": 16}, (8, 32)),
        ("input_features", {"encoder_config": SimpleNamespace(num_mel_bins=8)}, (56, 8)),
        ("input_features", {"input_feat_per_channel": 80, "max_source_positions": 16}, (56, 80)),
        ("input_features", {"num_mel_bins": 8, "input_size": 56}, (56, 56)),  # seven frames of mel bins together
        ("input_values", {"conv_stride": [5, 2]}, (190,)),
        ("input_values", {"encoder": SimpleNamespace(conv_stride=[5, 2])}, (190,)),
        ("input_values", {}, (6400,)),
        ("input_features", {}, None),
    ],
)
def test_a_recording_has_the_shape_that_a_config_tells(
    name: str, fields: dict[str, object], shape: tuple[int, ...] | None
) -> None:
    assert recording_shape(SimpleNamespace(**fields), name, 7) == shape


def test_a_joined_model_takes_what_its_encoder_takes() -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sound = hf.Wav2Vec2Config(**small, conv_dim=[4], conv_stride=[5], conv_kernel=[10], num_conv_pos_embedding_groups=2)
    text = hf.BertConfig(**small, vocab_size=20, is_decoder=True, add_cross_attention=True)
    config = hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(sound, text, decoder_start_token_id=4)
    made = example_inputs(hf.SpeechEncoderDecoderModel(config))
    assert {name: tuple(value.shape) for name, value in made.items()} == {
        "input_values": (2, 95),
        "decoder_input_ids": (2, 5),
    }


@pytest.mark.parametrize("frames", [pytest.param(18, marks=pytest.mark.further), 19])
def test_frames_that_are_joined_in_pairs_may_leave_one_over(frames: int, tmp_path: Path) -> None:
    """Whatever the example's length is: its other side is thousands of samples away from the least recordings."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    convs = {"conv_dim": [4, 4], "conv_stride": [64, 5], "conv_kernel": [64, 5], "squeeze_factor": 2}
    config = hf.SEWConfig(**small, **convs, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=12)
    torch.manual_seed(0)
    base = hf.SEWForCTC(config).eval()
    inputs = {"input_values": torch.randn(2, 320 * frames)}
    peftfx.transform(base, peftfx.LoRA(r=2), inputs=inputs).export(tmp_path / "out")
    served = OnnxModel(tmp_path / "out")
    for length in (320 * 7, 320 * 8 + 100, 320 * 31):
        heard = torch.randn(1, length)
        with torch.no_grad():
            want = base(input_values=heard).logits
        torch.testing.assert_close(served(input_values=heard)["logits"], want, atol=1e-5, rtol=1e-4)


class Hears(nn.Module):
    """A model whose first layer reads a recording itself, or with one axis more."""

    def __init__(self, first: nn.Module, *, adds_axis: bool = False) -> None:
        super().__init__()
        self.first, self.adds_axis = first, adds_axis

    def forward(self, heard: Tensor) -> Tensor:
        found: Tensor = self.first(heard[:, None] if self.adds_axis else heard)
        return found


@pytest.mark.parametrize(
    ("model", "told", "wanted"),
    [
        (Hears(nn.Linear(32, 4)), (56, 8), (56, 32)),
        (Hears(nn.Conv1d(8, 4, 3)), (8, 32), (8, 32)),
        (Hears(nn.Conv1d(1, 4, 3)), (160,), (1, 160)),
        (Hears(nn.Conv1d(1, 4, 3), adds_axis=True), (160,), (160,)),
    ],
    ids=["frames put together", "as the config tells", "channels", "channels that the code adds"],
)
def test_the_first_layer_says_how_wide_a_recording_is(
    model: nn.Module, told: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert fitted_shape(model, "heard", told) == wanted
    assert not any(module._forward_pre_hooks for module in model.modules())
