"""`peftfx convert`: kohya's and diffusers' single files both ways, a difference of checkpoints, and any adapter."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import peftfx
from peftfx.cli.main import app
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.convert_command import convert_directory
from peftfx.testing.models import Causal

SPEC = Causal((), layers=1)
INPUTS = SPEC.inputs(2, 4, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a checkpoint of it that differs, and a LoRA of `peft`'s."""
    folder, base = tmp_path_factory.mktemp("convert"), SPEC.build()
    base.save_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 3})
    theirs = peft.get_peft_model(base, config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=rng) / 2)
    theirs.save_pretrained(folder / "lora")
    torch.save(theirs.eval()(**INPUTS).logits.detach(), folder / "want.pt")
    theirs.merge_and_unload().save_pretrained(folder / "tuned")
    return folder


def said(folder: Path, adapter: Path) -> torch.Tensor:
    """What `peft` makes of a directory."""
    return peft.PeftModel.from_pretrained(SPEC.build(), adapter).eval()(**INPUTS).logits.detach()


@pytest.mark.parametrize(("to", "prefix"), [("kohya", "lora_te1"), ("diffusers", "text_encoder")])
def test_single_files_are_written_and_read(to: str, prefix: str, folder: Path, tmp_path: Path) -> None:
    base, want, file = folder / "base", torch.load(folder / "want.pt"), tmp_path / "one.safetensors"
    convert_directory(base, file, adapter=folder / "lora", to=to, prefix=prefix)
    tensors = load_file(file)
    key = "lora_te1_model_layers_0_self_attn_q_proj.lora_down.weight"
    assert (key if to == "kohya" else "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight") in tensors
    save_file({**tensors, "lora_unet_mid.lora_down.weight": torch.ones(1, 1)}, file)
    with pytest.warns(PeftfxWarning, match="modules of other models are left out"):
        convert_directory(base, tmp_path / "back", file=file)
    torch.testing.assert_close(said(folder, tmp_path / "back"), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("to", "begins"), [("kohya", "lora_unet_model_"), ("diffusers", "unet.model.")])
def test_keys_begin_as_each_format_has_it(to: str, begins: str, folder: Path, tmp_path: Path) -> None:
    convert_directory(folder / "base", tmp_path / "one.safetensors", adapter=folder / "lora", to=to)
    assert all(key.startswith(begins) for key in load_file(tmp_path / "one.safetensors"))


@pytest.mark.parametrize("name", ["one.bin", "one.PT", "one.ckpt"])
def test_no_file_has_the_name_of_a_pickle(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match=r"takes? a file of this name for a pickle(.|\n)*one\.safetensors"):
        convert_directory(folder / "base", tmp_path / name, adapter=folder / "lora", to="kohya")
    assert not (tmp_path / name).exists()


def test_a_difference_and_a_cut_by_the_command_line(folder: Path, tmp_path: Path) -> None:
    runner, want = CliRunner(), torch.load(folder / "want.pt")
    for name, source in (("difference", ["--tuned", "tuned"]), ("cut", ["--adapter", "lora"])):
        options = ["--base", str(folder / "base"), source[0], str(folder / source[1]), "--rank", "3"]
        result = runner.invoke(app, ["convert", *options, "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        torch.testing.assert_close(said(folder, tmp_path / name), want, atol=1e-4, rtol=1e-4)
        assert "a LoRA of 2 modules in the format of peft, of rank 3" in " ".join(result.output.split())


def test_what_a_cut_leaves_is_told(folder: Path, tmp_path: Path) -> None:
    said = convert_directory(folder / "base", tmp_path / "cut", adapter=folder / "lora", rank=1)
    assert re.search(r"of rank 1; it keeps \d\d\.\d\d% of the energy$", said)


def test_an_adapter_of_another_method_needs_a_rank(folder: Path, tmp_path: Path) -> None:
    loha = peft.get_peft_model(SPEC.build(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    loha.save_pretrained(tmp_path / "loha")
    with pytest.raises(PeftfxError, match="the adapter is LoHa, and a LoRA of it needs a rank"):
        convert_directory(folder / "base", tmp_path / "x", adapter=tmp_path / "loha")
    prompt = peftfx.transform(SPEC.build(), peftfx.PromptTuning(num_virtual_tokens=2))
    prompt.save_pretrained(tmp_path / "prompt")
    for rank in (None, 2):
        with pytest.raises(PeftfxError, match="PromptTuning does not update weights"):
            convert_directory(folder / "base", tmp_path / "x", adapter=tmp_path / "prompt", rank=rank)
    assert not (tmp_path / "x").exists()


def test_what_is_not_to_be_converted_is_refused(folder: Path, tmp_path: Path) -> None:
    base, other = folder / "base", tmp_path / "other.safetensors"
    save_file({"lora_te1_model_layers_0_self_attn_q_proj.lokr_w1": torch.ones(2, 2)}, other)
    with pytest.raises(PeftfxError, match="modules of it are not this model's, or have more or less"):
        convert_directory(base, tmp_path / "x", file=other)
    with pytest.raises(PeftfxError, match="needs a rank"):
        convert_directory(base, tmp_path / "x", tuned=folder / "tuned")
    with pytest.raises(PeftfxError, match="give exactly one"):
        convert_directory(base, tmp_path / "x")
    with pytest.raises(PeftfxError, match="only the keys of a single file have a prefix"):
        convert_directory(base, tmp_path / "x", adapter=folder / "lora", prefix="unet")
    with pytest.raises(PeftfxError, match="did you mean 'kohya'"):
        convert_directory(base, tmp_path / "x", adapter=folder / "lora", to="koya")


def test_force_replaces_no_input_and_no_other_file(folder: Path, tmp_path: Path) -> None:
    base, lora, notes = folder / "base", folder / "lora", tmp_path / "notes.txt"
    notes.write_text("years")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    places = ((base, "peft"), (lora, "peft"), (folder, "peft"), (base / "model.safetensors", "kohya"))
    for output, to in places:
        with pytest.raises(PeftfxError, match="would replace an input"):
            convert_directory(base, output, adapter=lora, rank=1, to=to, force=True)
    with pytest.raises(PeftfxError, match="not a safetensors file"):
        convert_directory(base, notes, adapter=lora, to="kohya", force=True)
    with pytest.raises(PeftfxError, match="there is no adapter in the directory"):
        convert_directory(base, tmp_path, adapter=lora, to="peft", force=True)
    assert [path.name for path in tmp_path.iterdir()] == [notes.name]
    assert notes.read_text() == "years"
    for _ in range(2):
        convert_directory(base, tmp_path / "one.safetensors", adapter=lora, to="kohya", force=True)
        convert_directory(base, tmp_path / "lora", adapter=lora, to="peft", force=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
