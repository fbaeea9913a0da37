"""A diffusion pipeline on the command line: text encoder, U-Net and the autoencoder's decoder, with LoRAs on each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import peft
import pytest
import torch
import transformers as hf
from every_model.diffusion_models import build_denoiser
from safetensors.torch import save_file
from support.adapted import randomise
from support.command import Result, assert_refused
from support.zoo import ZOO
from torch import Tensor, nn

from peftfx import runtime
from peftfx.bases.example_inputs import example_inputs

Run = Callable[..., Result]
#: Of the autoencoder, layers of the decoder: its encoder does not run in a pipeline that makes images.
TARGETS = {"text_encoder": ["q_proj", "v_proj"], "unet": ["to_q", "to_v"], "vae": r"decoder\..*(to_q|conv_in)"}
MARKS = {"text_encoder": "lora_te", "unet": "lora_unet", "vae": "lora_vae"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion, as its pipeline saves it; of the tokenizer there is no more than a file."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    hf.CLIPTextModel(hf.CLIPTextConfig(**text, vocab_size=99, max_position_embeddings=16)).save_pretrained(
        root / "text_encoder"
    )
    ZOO["unet"].build().save_pretrained(root / "unet")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 8, "sample_size": 16}
    diffusers.AutoencoderKL(**blocks, **sizes).save_pretrained(root / "vae")
    diffusers.DDIMScheduler().save_pretrained(root / "scheduler")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text("{}", encoding="utf-8")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
    }
    (root / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return root


def model_of(pipeline: Path, part: str) -> nn.Module:
    kinds = {"text_encoder": hf.CLIPTextModel, "unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    return kinds[part].from_pretrained(pipeline / part).eval()


def adapted(pipeline: Path, part: str, folder: Path | None = None) -> nn.Module:
    model = peft.get_peft_model(model_of(pipeline, part), peft.LoraConfig(r=3, target_modules=TARGETS[part]))
    randomise(model)
    if folder is not None:
        model.save_pretrained(str(folder / part))
    return model.eval()


def single_file(models: dict[str, nn.Module], path: Path, how: str) -> Path:
    """The LoRAs of models in one file, as kohya's trainers or diffusers write them."""
    tensors: dict[str, Tensor] = {}
    for part, model in models.items():
        for name, value in peft.get_peft_model_state_dict(model).items():
            own, _, end = name.removeprefix("base_model.model.").partition(".lora_")
            if how == "kohya":
                stem, end = f"{MARKS[part]}_{own.replace('.', '_')}", {"A.weight": "down", "B.weight": "up"}[end]
                tensors[f"{stem}.lora_{end}.weight"] = value.contiguous()
                tensors[f"{stem}.alpha"] = torch.tensor(8.0)  # what peft's config has by default
            else:  # without alphas: the scale is in B
                scale = 8.0 / 3 if end.startswith("B") else 1.0
                tensors[f"{part}.{own}.lora_{end}"] = (value * scale).contiguous()
    save_file(tensors, path)
    return path


def compare(directory: Path, models: dict[str, nn.Module]) -> None:
    torch.manual_seed(1)
    ids, latents = torch.randint(2, 90, (3, 6)), torch.randn(3, 4, 8, 8)
    states = torch.randn(3, 6, 24)
    steps = torch.randint(1000, (3,))
    with torch.no_grad():
        want = {
            "text_encoder": models["text_encoder"](input_ids=ids).last_hidden_state,
            "unet": models["unet"](sample=latents, timestep=steps, encoder_hidden_states=states).sample,
            "vae_decoder": models["vae"].decode(latents[:, :, :5]).sample,  # a size of its own
        }
    calls = {
        "text_encoder": {"input_ids": ids},
        "unet": {"sample": latents, "timestep": steps, "encoder_hidden_states": states},
        "vae_decoder": {"latent_sample": latents[:, :, :5]},
    }
    for name, call in calls.items():
        found = next(iter(runtime.load(directory / name)(**call).values()))
        torch.testing.assert_close(found, want[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["peft", "kohya", "diffusers"])
def test_each_model_of_a_pipeline_is_exported_with_its_lora(
    how: str, pipeline: Path, tmp_path: Path, peftfx: Run
) -> None:
    folder = tmp_path / "adapters"
    parts = ("text_encoder", "unet", "vae") if how == "peft" else ("text_encoder", "unet")
    models = {part: adapted(pipeline, part, folder if how == "peft" else None) for part in parts}
    given = folder if how == "peft" else single_file(models, tmp_path / "lora.safetensors", how)
    result = peftfx("export", "--base", pipeline, "--adapter", given, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    compare(tmp_path / "out", {"vae": model_of(pipeline, "vae"), **models})
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").is_file()
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").is_file()
    assert (tmp_path / "out" / "model_index.json").is_file()
    record = json.loads((tmp_path / "out" / "peftfx_pipeline.json").read_text())
    there = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert set(record["files"]) == {path.relative_to(tmp_path / "out").as_posix() for path in there}


def test_what_is_no_parts_is_refused(pipeline: Path, tmp_path: Path, peftfx: Run) -> None:
    export = ("export", "--base", pipeline, "--output", tmp_path / "out")
    save_file({"lora_te2_text_model.lora_down.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    assert_refused(peftfx(*export, "--adapter", tmp_path / "other.safetensors"), "of no part of the pipeline")
    save_file({"lora_unet_nothing.lora_down.weight": torch.ones(2, 2)}, tmp_path / "given.safetensors")
    unknown = peftfx(*export, "--adapter", tmp_path / "given.safetensors")
    assert_refused(unknown, "names a module of this model", "given.safetensors]")
    (tmp_path / "none").mkdir()
    assert_refused(peftfx(*export, "--adapter", tmp_path / "none"), "no adapter for any of the parts")
    assert_refused(peftfx(*export, "--dry-run"), "one of its models")
    assert_refused(peftfx(*export, "--swappable"), "one of them alone")
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_may_be_replaced_unless_files_were_added(pipeline: Path, tmp_path: Path, peftfx: Run) -> None:
    words, output = ("export", "--base", pipeline, "--output", tmp_path / "out"), tmp_path / "out"
    names = ("unet/peftfx_report.json", "vae_decoder/peftfx_report.json", "scheduler/scheduler_config.json")
    for name in names:
        (output / name).parent.mkdir(parents=True)
        (output / name).write_text('{"files": ["peftfx_report.json"]}')
    (output / "peftfx_pipeline.json").write_text(json.dumps({"files": [*names, "peftfx_pipeline.json"]}))
    assert_refused(peftfx(*words), "pass --force")
    (output / "unet" / "notes.md").write_text("mine")
    (output / "more").mkdir()
    (output / "more" / "a.onnx_adapter").write_text("mine")
    (output / "scheduler" / "mine.json").write_text("mine")
    lost = "would be lost: more/a.onnx_adapter, scheduler/mine.json, unet/notes.md"
    assert_refused(peftfx(*words, "--force"), lost)


@pytest.mark.slow
def test_a_transformer_and_a_projecting_text_encoder_are_parts_too(tmp_path: Path, peftfx: Run) -> None:
    """As in the pipelines of SD 3: with a LoRA in diffusers' format, for the transformer."""
    root, part = tmp_path / "pipeline", "transformer"
    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.CLIPTextConfig(**text, projection_dim=16, vocab_size=99, max_position_embeddings=16)
    hf.CLIPTextModelWithProjection(config).save_pretrained(root / "text_encoder_2")
    base = build_denoiser("sd3")
    base.save_pretrained(root / part)
    index = {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        part: ["diffusers", "SD3Transformer2DModel"],
    }
    (root / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["to_q", "to_v"])).eval()
    randomise(model)
    lora = single_file({part: model}, tmp_path / "lora.safetensors", "diffusers")
    result = peftfx("export", "--base", root, "--adapter", lora, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    inputs = example_inputs(base, sizes={"batch": 3, "sequence": 5}, seed=2)
    with torch.no_grad():
        want = model(**inputs).sample
    got = runtime.load(tmp_path / "out" / part)(**inputs)
    torch.testing.assert_close(next(iter(got.values())), want, atol=1e-4, rtol=1e-3)
    encoder = runtime.load(tmp_path / "out" / "text_encoder_2")
    assert "text_embeds" in encoder(input_ids=torch.tensor([[5, 6, 7]]))
