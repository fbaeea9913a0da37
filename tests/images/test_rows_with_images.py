"""Rows of a batch have adapters of their own, which act where images are encoded too."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from every_model.checks import build
from support.adapted import randomise
from support.few import but_for
from torch import nn

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of
from peftfx.errors import PeftfxWarning

pytestmark = pytest.mark.further

TASK = "image-text-to-text"
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
OF_TEXTS = r".*language_model.*(q_proj|v_proj|down_proj|fc1)"


def opened(model: nn.Module) -> nn.Module:
    """A model whose layers that attend to images do so: the gates of new ones are closed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(2.0)
    return model


def exported(
    kind: str, root: Path, targets: str, size: tuple[int, int] | None = None, **more: object
) -> dict[str | None, nn.Module]:
    """Export two adapters of `peft` by row, and return the models that each row is held against."""
    wants: dict[str | None, nn.Module] = {None: opened(build(TASK, kind))}
    for name, alpha in (("a", 8), ("b", 3)):
        options = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=targets, **more)
        wants[name] = peft.get_peft_model(opened(build(TASK, kind)), options).eval()
        randomise(wants[name])
        wants[name].save_pretrained(str(root / name))
    model = peftfx.load(opened(build(TASK, kind)), root / "a", adapter_name="a")
    model.load_adapter(root / "b", "b")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not run these modules", PeftfxWarning)
        model.export(root / "out", view="decode", batched=["a", "b"], image_size=size)
    return wants


def hold(wants: dict[str | None, nn.Module], root: Path, images: int, size: tuple[int, int] | None = None) -> None:
    served, names = runtime.load(root / "out"), ["b", None, "a"]
    more = {"images": images} if images else {}
    with pictures_of(size):
        given = example_inputs(wants[None], sizes={"batch": 3, "sequence": 9, **more}, seed=3)
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    for beams in (1, 2):
        said = served.generate(**given, **OPTIONS, num_beams=beams, adapter_ids=names)
        for row, name in enumerate(names):
            assert torch.equal(said[row], wants[name].generate(**given, **OPTIONS, num_beams=beams)[row]), name
    assert len({tuple(row[-5:].tolist()) for row in said}) == 3


@pytest.mark.parametrize("kind", but_for({"llava"}, ["llava", "gemma3", "florence2", "mllama"]))
def test_each_row_has_its_adapter_beside_images(kind: str, tmp_path: Path) -> None:
    """The adapters act in the text's layers; florence2 encodes its text, too. The images' graph takes no number."""
    wants = exported(kind, tmp_path, OF_TEXTS)
    hold(wants, tmp_path, 0)
    assert ("adapter_ids" in runtime.load(tmp_path / "out").graphs["vision_encoder"].inputs) == (kind == "mllama")


@pytest.mark.parametrize("kind", but_for({"llava"}, ["llava", "gemma3", "florence2", "mllama"]))
def test_an_image_is_encoded_under_the_adapter_of_its_row(kind: str, tmp_path: Path) -> None:
    projector = "|multi_modal_projector" if kind == "mllama" else ""  # in others, a module with layers
    targets = rf".*\.(q_proj|v_proj|qkv|fc1|linear_1{projector})$"
    wants = exported(kind, tmp_path, targets, bias="all" if kind == "llava" else "none", use_dora=kind == "mllama")
    assert "adapter_ids" in runtime.load(tmp_path / "out").graphs["vision_encoder"].inputs
    for images in (0, 5) if kind in ("llava", "gemma3") else (0,):  # of five, the first row has three
        hold(wants, tmp_path, images)


@pytest.mark.parametrize("kind", but_for({"qwen2_vl"}, ["qwen2_vl", "smolvlm"]))
def test_images_of_a_chosen_size_have_the_adapters_of_their_rows(kind: str, tmp_path: Path) -> None:
    wants = exported(kind, tmp_path, "all-linear", (64, 64))
    for images in (0, 4) if kind == "qwen2_vl" else (0,):
        hold(wants, tmp_path, images, (64, 64))


def test_each_row_has_its_prompt_or_prefix_before_an_image(tmp_path: Path) -> None:
    """Where the types of tokens say what sees what, the text is behind the longest prefix: this was not verified."""
    model = peftfx.transform(build(TASK, "gemma3"), peftfx.PromptTuning(num_virtual_tokens=3), "prompt", seed=0)
    model.add_adapter("prefix", peftfx.PrefixTuning(num_virtual_tokens=2), seed=0)
    model.add_adapter("lora", peftfx.LoRA(r=2, target="attention.query"), seed=0)
    for name in model.names():
        model.set_adapter(name)
        randomise(model)
    model.eval().export(tmp_path / "out", view="decode", batched=model.names())
    served, given = (
        runtime.load(tmp_path / "out"),
        example_inputs(model.base, sizes={"batch": 3, "sequence": 6}, seed=2),
    )
    for names in (["prompt", "lora", "prefix"], [None, "prefix", "prompt"]):
        said = served.generate(**given, **OPTIONS, adapter_ids=names)
        for row, name in enumerate(names):
            model.set_adapter(name or "lora")
            wanted = (model if name else model.base).generate(**given, **OPTIONS)
            assert torch.equal(said[row], wanted[row]), name


def test_a_prefix_before_keys_of_images_is_refused_in_words(tmp_path: Path) -> None:
    model = peftfx.transform(build(TASK, "mllama"), peftfx.PrefixTuning(num_virtual_tokens=3), "a", seed=0)
    with pytest.raises(PeftfxError, match="a soft prompt has no place in a cache with keys and values of images"):
        model.export(tmp_path / "out", view="decode", batched=["a"])
    assert not list(tmp_path.iterdir())
