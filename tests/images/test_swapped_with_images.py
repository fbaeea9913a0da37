"""Adapters are swapped in forward views of text and images, also where the code takes images one after the other."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build
from support.adapted import randomise
from support.command import Result
from support.few import but_for
from support.slots import stirred

import peftfx
from peftfx import PeftfxError, export_onnx, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of
from peftfx.errors import PeftfxWarning

pytestmark = pytest.mark.further

TASK = "image-text-to-text"
Run = Callable[..., Result]


@pytest.mark.parametrize("kind", but_for({"paligemma", "qwen2_vl"}, ["llava", "paligemma", "qwen2_vl", "gemma3"]))
def test_adapters_are_swapped_for_any_number_of_images(kind: str, tmp_path: Path) -> None:
    base = build(TASK, kind)
    targets = r".*(language_model|projector|vision_tower|visual).*(q_proj|v_proj|fc1|linear_[12]|down_proj)"
    theirs = peft.get_peft_model(build(TASK, kind), peft.LoraConfig(r=3, target_modules=targets)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "a"))
    export_onnx(base, tmp_path / "out", slots="all-linear", view="forward")
    served, ours = runtime.load(tmp_path / "out"), peftfx.load(build(TASK, kind), tmp_path / "a")
    if kind == "llava":  # features are those of the layer before the last
        with pytest.warns(PeftfxWarning, match="does not run these modules"):
            path = peftfx.export_adapter(ours, tmp_path / "out", tmp_path / "a.onnx_adapter")
    else:
        path = peftfx.export_adapter(ours, tmp_path / "out", tmp_path / "a.onnx_adapter")
    served.load_adapter(path, "a")
    apart = served.model.axes["pixel_values"][0] == "images"  # a slot for a prefix counted its rows by images there
    assert apart or kind != "gemma3"
    for batch, images in ((1, 1), (3, 3), *([(3, 4), (3, 2)] if apart else [])):
        given = example_inputs(base, sizes={"batch": batch, "sequence": 9, "images": images}, seed=batch)
        shown = given["attention_mask"].bool()
        for name, model in (("a", theirs), (None, base)):
            served.set_adapter(name)
            with torch.no_grad():
                want = model(**given).logits
            torch.testing.assert_close(served(**given).logits[shown], want[shown], atol=1e-4, rtol=1e-3)


def test_what_is_refused_tells_of_an_export_that_there_is(tmp_path: Path) -> None:
    ours = peftfx.transform(build(TASK, "llava"), peftfx.LoRA(r=2, target="attention.query"), "low")
    with pytest.raises(PeftfxError, match="images") as refused:
        ours.export(tmp_path / "out", view="forward", batched=["low"])
    assert refused.value.hint.endswith("export it merged, or with --swappable")
    assert not list(tmp_path.iterdir())


def _held(kind: str, root: Path, image: str, size: tuple[int, int] | None = None) -> None:
    """Two adapters of `peft` in all parts of a model, swapped in an export with a cache: tokens are those of `peft`."""
    theirs = {}
    for name, alpha in (("a", 8), ("b", 3)):
        options = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules="all-linear")
        theirs[name] = peft.get_peft_model(build(TASK, kind), options).eval()
        randomise(theirs[name])
        theirs[name].save_pretrained(str(root / name))
    base = build(TASK, kind)
    export_onnx(base, root / "out", slots="all-linear", view="decode", image_size=size)
    served = runtime.load(root / "out")
    assert set(served.graphs) == {"vision_encoder", "model"}
    for name in theirs:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the graph does not run these modules", PeftfxWarning)
            path = peftfx.export_adapter(peftfx.load(build(TASK, kind), root / name), root / "out", root / f"{name}_")
        served.load_adapter(path, name)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for texts in (1, 2):
        with pictures_of(size):
            given = example_inputs(base, sizes={"batch": texts, "sequence": 9}, seed=texts)
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
        said = []
        for name, model in (*theirs.items(), (None, base)):
            served.set_adapter(name)
            said.append(served.generate(**given, **options))
            assert torch.equal(said[-1], model.generate(**given, **options)), name
            assert torch.equal(served.generate(**{n: v.numpy() for n, v in given.items()}, **options), said[-1])
            other = served.generate(**{**given, image: given[image].flip(-1)}, **options)
            with torch.no_grad():
                assert torch.equal(other, model.generate(**{**given, image: given[image].flip(-1)}, **options)), name
        assert not torch.equal(said[0], said[1])


@pytest.mark.parametrize("kind", but_for({"gemma3", "paligemma"}, ["llava", "gemma3", "mllama", "paligemma"]))
def test_adapters_are_swapped_in_views_with_a_cache(kind: str, tmp_path: Path) -> None:
    _held(kind, tmp_path, "pixel_values")


@pytest.mark.parametrize("kind", but_for({"qwen2_vl"}, ["smolvlm", "qwen2_vl", "idefics3", "llava_next"]))
def test_adapters_are_swapped_where_the_size_of_a_picture_is_chosen(kind: str, tmp_path: Path) -> None:
    _held(kind, tmp_path, "pixel_values", (64, 64))


@pytest.mark.parametrize("size", [(48, 40), "any", None])
def test_an_adapter_is_held_to_the_size_that_images_have_in_its_graph(size: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    base = hf.ViTForImageClassification(config).eval()
    export_onnx(base, tmp_path / "out", slots="all-linear", view="forward", image_size=size)
    ours = peftfx.transform(base, peftfx.LoRA(r=2, init_lora_weights=False))
    served = runtime.load(tmp_path / "out")
    served.load_adapter(peftfx.export_adapter(ours, tmp_path / "out", tmp_path / "a"), "a")
    served.set_adapter("a")
    x = torch.randn(3, 3, *((32, 32) if size is None else (48, 40)))
    with torch.no_grad():
        want = ours(pixel_values=x, interpolate_pos_encoding=size is not None).logits
    torch.testing.assert_close(served(pixel_values=x).logits, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", but_for({"paligemma", "gemma3"}, ["llava", "gemma3", "paligemma"]))
def test_each_row_has_a_prefix_of_its_own_length_beside_images(kind: str, tmp_path: Path) -> None:
    """Types of tokens are read at the places of the cache, and the places of a row depend on its prefix."""
    lengths = {"three": 3, "five": 5}
    for name, length in lengths.items():
        rule = peftfx.PrefixTuning(num_virtual_tokens=length)
        if name == "three":
            model = peftfx.transform(build(TASK, kind), rule, name, seed=0)
        else:
            model.add_adapter(name, rule, seed=1)
    stirred(model, *lengths)
    model.export(tmp_path / "out", view="decode", batched=list(lengths))
    served, names = runtime.load(tmp_path / "out"), ["five", None, "three"]
    given = example_inputs(model.base, sizes={"batch": 3, "sequence": 9}, seed=3)
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = served.generate(**given, **options, adapter_ids=names)
    for row, name in enumerate(names):
        model.set_adapter(name or ())
        assert torch.equal(said[row], model.generate(**given, **options)[row]), name


def test_the_command_swaps_adapters_where_pictures_have_a_chosen_size(tmp_path: Path, peftfx: Run) -> None:
    """Layers of the image encoder have slots, and the adapter is counted in the graphs that it is for."""
    base, size = build(TASK, "qwen2_vl"), (64, 64)
    shutil.copytree(base.config.name_or_path, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=3, target_modules=r".*(qkv|fc1|q_proj)", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, options).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "a"))
    made = ("--swappable", "--view", "decode", "--image-size", "64x64", "--output", tmp_path / "out")
    result = peftfx("export", "--base", tmp_path / "base", *made)
    assert result.code == 0, result.err
    result = peftfx(
        "export-adapter", "--adapter", tmp_path / "a", "--for", tmp_path / "out", "--output", tmp_path / "b"
    )
    assert result.code == 0, result.err
    count = sum("lora_" in name for name, _ in theirs.named_parameters())
    assert f"{count} tensors in the files: {count} put into slots" in result.err
    served = runtime.load(tmp_path / "out", adapter=tmp_path / "b.onnx_adapter")
    with pictures_of(size):
        given = example_inputs(theirs, sizes={"batch": 2, "sequence": 9, "images": 2}, seed=1)
    said = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(served.generate(**given, **said), theirs.generate(**given, **said))


def test_outputs_that_are_none_in_a_list_are_left_out(tmp_path: Path) -> None:
    """Layers of which the model's code keeps no features."""
    export_onnx(build(TASK, "qianfan_ocr"), tmp_path / "out", slots="all-linear", view="forward")
    assert {"prompt"} <= {*runtime.load(tmp_path / "out").model.slots}
