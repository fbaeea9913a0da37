"""Adapters in one file: DoRA, biases and LoHa, older names, and the names of SDXL's and Flux's first publishers.

The oracle is HF PEFT's layer at the same module, with the same tensors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from every_model.diffusion_models import build_denoiser
from safetensors.torch import load_file, save_file
from support.adapted import randomise
from torch import Tensor, nn

import peftfx
from peftfx.adapters.files.writer import write_rule_directory
from peftfx.adapters.single_files.reading import as_peft
from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.convert_command import convert_directory
from peftfx.rules.peft_files import WEIGHTS
from peftfx.testing.models import Causal

pytestmark = pytest.mark.further

#: Paths of a small U-Net, and the names that kohya's trainer gives them in SDXL.
PUBLISHED = {
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q": "input_blocks_5_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0": (
        "input_blocks_4_1_transformer_blocks_0_attn2_to_out_0"
    ),
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block_1_transformer_blocks_0_ff_net_0_proj",
    "up_blocks.0.resnets.2.conv_shortcut": "output_blocks_2_0_skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "conv_out": "out_2",
}
ATTENTION = r".*attn1\.to_[qkv]|.*attn2\.to_out\.0"


def _unet(layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(sample_size=8, layers_per_block=layers, **sizes, **blocks).eval()


def _said(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).sample
    return found


def _trained(base: nn.Module, config: peft.PeftConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base with a random adapter of peft, and the adapter's tensors by their paths."""
    model = peft.get_peft_model(base, config).eval()
    randomise(model)
    state = peft.get_peft_model_state_dict(model)
    return model, {name.removeprefix("base_model.model."): t.contiguous() for name, t in state.items()}


def _kohya(tensors: dict[str, Tensor], named: Callable[[str], str], alpha: float | None) -> dict[str, Tensor]:
    """The tensors as kohya's trainers and LyCORIS write them."""
    ends = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "lora_magnitude_vector": "dora_scale",
    }
    found = {}
    for name, tensor in tensors.items():
        at = next(i for mark in (".lora_", ".hada_") if (i := name.find(mark)) >= 0)
        stem, end = named(name[:at]), ends.get(name[at + 1 :], name[at + 1 :])
        found[f"{stem}.{end}"] = tensor.reshape(tensor.numel(), 1) if end == "dora_scale" else tensor
        if alpha is not None:
            found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


def _flat(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


def _compare(base: nn.Module, want: nn.Module, file: Path, tmp_path: Path) -> None:
    config, tensors = as_peft(file, base)
    tmp_path.mkdir(exist_ok=True)
    write_rule_directory(tmp_path, config, {WEIGHTS: tensors})
    inputs = example_inputs(base, sizes={"batch": 3, "sequence": 5}, seed=2)
    before = _said(base, inputs)
    expected = _said(want, inputs)
    ours = peftfx.load(base, tmp_path, inputs=inputs)
    torch.testing.assert_close(_said(ours, inputs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2


@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_names_of_the_first_publisher_of_sdxl(dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=list(PUBLISHED), use_dora=dora)
    want, tensors = _trained(_unet(2), config)
    save_file(_kohya(tensors, lambda path: f"lora_unet_{PUBLISHED[path]}", 2.0), tmp_path / "lora.safetensors")
    _compare(_unet(2), want, tmp_path / "lora.safetensors", tmp_path)


def test_a_dora_and_a_lora_in_one_file_are_refused(tmp_path: Path) -> None:
    _, tensors = _trained(_unet(2), peft.LoraConfig(r=4, target_modules=list(PUBLISHED), use_dora=True))
    first = next(name for name in tensors if name.endswith("magnitude_vector"))
    del tensors[first]
    save_file(_kohya(tensors, lambda path: f"lora_unet_{PUBLISHED[path]}", 2.0), tmp_path / "lora.safetensors")
    with pytest.raises(PeftfxError, match="1 of its 10 modules have no lora_magnitude_vector"):
        as_peft(tmp_path / "lora.safetensors", _unet(2))


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_files_are_written_as_they_are_read(to: str, dora: bool, tmp_path: Path) -> None:
    _unet().save_pretrained(tmp_path / "base")
    want, _ = _trained(_unet(), peft.LoraConfig(r=3, lora_alpha=9, target_modules=["to_q", "conv1"], use_dora=dora))
    want.save_pretrained(tmp_path / "peft")
    file = tmp_path / "lora.safetensors"
    prefix = "lora_unet" if to == "kohya" else "unet"
    convert_directory(tmp_path / "base", file, adapter=tmp_path / "peft", to=to, prefix=prefix)
    assert any("dora_scale" in name or "magnitude" in name for name in load_file(file)) == dora
    _compare(_unet(), want, file, tmp_path / "read")


@pytest.mark.parametrize("effective", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_loha_of_lycoris(effective: bool, tmp_path: Path) -> None:
    config = peft.LoHaConfig(
        r=3, alpha=6, target_modules=["to_q", "conv1"], use_effective_conv2d=effective, init_weights=False
    )
    want, tensors = _trained(_unet(), config)
    save_file(_kohya(tensors, _flat, 6.0), tmp_path / "loha.safetensors")
    _compare(_unet(), want, tmp_path / "loha.safetensors", tmp_path)
    _unet().save_pretrained(tmp_path / "base")
    told = convert_directory(tmp_path / "base", tmp_path / "peft", file=tmp_path / "loha.safetensors")
    assert f"a LoHa of {len(tensors) // (6 if effective else 4)} modules" in told or effective


def test_biases_of_b_and_the_names_of_attention_processors(tmp_path: Path) -> None:
    want, tensors = _trained(_unet(), peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, lora_bias=True))
    _unet().save_pretrained(tmp_path / "base")
    want.save_pretrained(tmp_path / "peft")
    file, theirs = tmp_path / "bias.safetensors", tmp_path / "peft"
    made = functools.partial(convert_directory, tmp_path / "base", file, adapter=theirs)
    made(to="diffusers", prefix="unet")
    _compare(_unet(), want, file, tmp_path)
    with pytest.raises(PeftfxError, match="kohya's format has no biases of B"):
        made(to="kohya", force=True)
    want, tensors = _trained(_unet(), peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    older = {}
    for name, tensor in tensors.items():
        for new, old in ((".lora_A", "_lora.down"), (".lora_B", "_lora.up"), (".to_out.0", ".to_out")):
            name = name.replace(new, old)
        older[f"unet.{name}".replace(".to_", ".processor.to_")] = tensor
    save_file(older, tmp_path / "older.safetensors")
    _compare(_unet(), want, tmp_path / "older.safetensors", tmp_path / "older")


def test_magnitudes_of_inputs_are_refused(tmp_path: Path) -> None:
    _, tensors = _trained(_unet(), peft.LoraConfig(r=4, target_modules=["to_q"], use_dora=True))
    found = _kohya(tensors, _flat, None)
    found |= {name: t.reshape(1, -1) for name, t in found.items() if name.endswith("dora_scale")}
    save_file(found, tmp_path / "dora.safetensors")
    with pytest.raises(PeftfxError, match="has one magnitude for each input"):
        as_peft(tmp_path / "dora.safetensors", _unet())


@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fused_layers_of_flux_are_cut(dora: bool, tmp_path: Path) -> None:
    """kohya's trainer has one LoRA for queries, keys and values, whose A is then that of all three."""
    block = "transformer_blocks.0"
    parts = [f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=[*parts, f"{block}.ff.net.2"], use_dora=dora)
    torch.manual_seed(0)
    base = build_denoiser("flux")
    base.save_pretrained(tmp_path / "base")
    want, tensors = _trained(base, config)
    a = f"{parts[0]}.lora_A.weight"
    with torch.no_grad():
        for part in parts[1:]:
            want.get_submodule(f"base_model.model.{part}.lora_A.default").weight.copy_(tensors[a])
    fused = {
        name.replace(".to_q.", ".qkv."): torch.cat([tensors[name.replace(parts[0], part)] for part in parts])
        for name in tensors
        if name.startswith(f"{parts[0]}.") and name != a
    }
    fused |= {a.replace(".to_q.", ".qkv."): tensors[a]}
    fused |= {name: t for name, t in tensors.items() if ".ff." in name}
    names = {f"{block}.attn.qkv": "double_blocks_0_img_attn_qkv", f"{block}.ff.net.2": "double_blocks_0_img_mlp_2"}
    save_file(_kohya(fused, lambda path: f"lora_unet_{names[path]}", 2.0), tmp_path / "lora.safetensors")
    plain = type(base).from_pretrained(tmp_path / "base").eval()
    _compare(plain, want, tmp_path / "lora.safetensors", tmp_path)


def test_a_file_of_two_models_keeps_each_ones_scale(tmp_path: Path) -> None:
    """diffusers writes the config of each model into the file's metadata, under the model's prefix."""
    _, tensors = _trained(_unet(), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["to_q"]))
    told = {"unet.r": 4, "unet.lora_alpha": 12, "text_encoder.r": 3, "text_encoder.lora_alpha": 9}
    both = {f"unet.{name}": t for name, t in tensors.items()}
    both |= {f"text_encoder.encoder.layers.0.q.lora_{end}.weight": torch.ones(3, 3) for end in "AB"}
    save_file(both, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    with pytest.warns(PeftfxWarning, match="modules of other models are left out"):
        config, _ = as_peft(tmp_path / "lora.safetensors", _unet())
    assert config["lora_alpha"] == 12


def test_the_adapter_of_another_model_is_not_taken_by_chance(tmp_path: Path) -> None:
    """kohya's files of SDXL have two text encoders, by the same names."""
    base, wider = (Causal((), layers=n).build() for n in (1, 2))
    rows, columns = base.get_submodule("model.layers.0.self_attn.q_proj").weight.shape
    stem = "lora_te1_model_layers_0_self_attn_q_proj"
    one = {f"{stem}.lora_down.weight": torch.ones(2, columns), f"{stem}.lora_up.weight": torch.ones(rows, 2)}
    both = one | {name.replace("te1", "te2"): 2 * t for name, t in one.items()}
    save_file(both, tmp_path / "twins.safetensors")
    with pytest.raises(PeftfxError, match="adapters of several models in it fit this one"):
        as_peft(tmp_path / "twins.safetensors", base)
    more = {name.replace("te1", "te2").replace("_0_", "_1_"): 2 * t for name, t in one.items()}
    save_file(both | more, tmp_path / "deeper.safetensors")
    for model, value in ((base, 1.0), (wider, 2.0)):
        with pytest.warns(PeftfxWarning, match="modules of other models are left out"):
            _, found = as_peft(tmp_path / "deeper.safetensors", model)
        assert {float(t.max()) for t in found.values()} == {value}


def test_a_module_whose_name_ends_anothers_is_taken_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build_denoiser("flux")
    base.save_pretrained(tmp_path / "base")
    want, tensors = _trained(base, peft.LoraConfig(r=2, lora_alpha=2, target_modules=r"proj_out"))
    assert {name.partition(".lora")[0] for name in tensors} == {"proj_out"}
    save_file({f"transformer.{name}": t for name, t in tensors.items()}, tmp_path / "lora.safetensors")
    plain = type(base).from_pretrained(tmp_path / "base").eval()
    _compare(plain, want, tmp_path / "lora.safetensors", tmp_path / "read")


def test_names_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    save_file({"lora_unet_nowhere_at_all.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(PeftfxError, match="no key of it names a module of this model"):
        as_peft(tmp_path / "lora.safetensors", _unet())


def test_a_folder_of_diffusers_is_told_how_to_become_an_adapter(tmp_path: Path) -> None:
    """`save_lora_adapter` writes no config; the message named only `save_pretrained`."""
    save_file({"to_q.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(PeftfxError, match=r"peftfx convert --base BASE --file .*pytorch_lora_weights\.safetensors"):
        peftfx.load(_unet(), tmp_path)
