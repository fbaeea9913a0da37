"""Adapters are swapped in forward views of text and images, also where the code takes images one after the other."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from every_model.checks import build
from support.adapted import randomise
from support.few import but_for

import peftfx
from peftfx import PeftfxError, export_onnx, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxWarning

pytestmark = pytest.mark.further

TASK = "image-text-to-text"


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


@pytest.mark.parametrize("view", ["forward", "decode"])
def test_what_is_refused_tells_of_an_export_that_there_is(view: str, tmp_path: Path) -> None:
    ours = peftfx.transform(build(TASK, "llava"), peftfx.LoRA(r=2, target="attention.query"), "low")
    with pytest.raises(PeftfxError, match="images") as refused:
        ours.export(tmp_path / "out", view=view, batched=["low"])
    assert refused.value.hint == "export it merged, or with --swappable --view forward"
    assert not list(tmp_path.iterdir())
    if view == "decode":
        with pytest.raises(PeftfxError, match="reads images") as refused:
            export_onnx(build(TASK, "llava"), tmp_path / "out", view=view, slots="all-linear")
        assert refused.value.hint == "export it merged, or with --view forward"
