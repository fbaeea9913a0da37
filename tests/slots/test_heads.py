"""Heads that were trained beside an adapter are swapped with it, though no task type of `peft` names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.adapted import randomise
from support.few import but_for
from support.zoo import ZOO

import peftfx
from peftfx import PeftfxError, export_onnx, runtime
from peftfx.graph.slots import SLOT_OWN, Manifest

pytestmark = pytest.mark.further

#: A model, its head, and the slots that its graph has.
CASES = {
    "vit": ("vit", "classifier", "all-linear"),
    "swin": ("swin", "classifier", "all-linear"),
    "vit, asked for": ("vit", "classifier", "all-linear | head"),
    "llama, asked for": ("llama", "lm_head", "all-linear | head"),
    "deberta_v2": ("deberta_v2", "classifier", "all-linear"),  # its attentions put rows and heads on one axis
}


def trained(name: str, root: Path, saved: str, **fields: Any) -> Any:
    """A model of `peft` with a LoRA and a trained copy of a module, saved at `root`."""
    torch.manual_seed(0)  # of the adapter's initial values, by which its rounding in int8 differs
    model = peft.get_peft_model(
        ZOO[name].build(), peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=[saved], **fields)
    ).eval()
    randomise(model)
    model.save_pretrained(str(root), save_embedding_layers=False)
    return model


@pytest.mark.parametrize("case", but_for({"swin"}, CASES))
@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_a_trained_head_is_swapped(case: str, quantize: str | None, tmp_path: Path) -> None:
    name, head, slots = CASES[case]
    theirs, base = trained(name, tmp_path / "a", head), ZOO[name].build()
    export_onnx(base, tmp_path / "out", slots=slots, view="forward", **({"quantize": quantize} if quantize else {}))
    ours = peftfx.load(ZOO[name].build(), tmp_path / "a")
    served = runtime.load(tmp_path / "out")
    served.load_adapter(peftfx.export_adapter(ours, tmp_path / "out", tmp_path / "a.onnx_adapter"), "a")
    bound = {"atol": 0.2, "rtol": 0.2} if quantize else {"atol": 1e-4, "rtol": 1e-4}
    for rows in (1, 3):
        given = {key: value[:1].repeat(rows, *[1] * (value.ndim - 1)) for key, value in ZOO[name].inputs().items()}
        for adapter, model in (("a", theirs), (None, base)):
            served.set_adapter(adapter)
            with torch.no_grad():
                torch.testing.assert_close(served(**given).logits, model(**given).logits, **bound)


@pytest.mark.parametrize(("slots", "hint"), [("attention", "--slots"), ("all-linear", "export the adapter merged")])
def test_what_has_no_slot_is_told_with_what_would_help(slots: str, hint: str, tmp_path: Path) -> None:
    """Other slots help a low-rank sum. No slot takes a trained copy of the weight of a layer that is no head."""
    layer = next(site.path for site in peftfx.inspect(ZOO["vit"].build()) if site.role == "mlp.up")
    method = peftfx.LoRA(r=2, target=layer) if slots == "attention" else peftfx.LoRA(modules_to_save=[layer])
    export_onnx(ZOO["vit"].build(), tmp_path / "out", slots=slots, view="forward")
    ours = peftfx.transform(ZOO["vit"].build(), method)
    randomise(ours)
    with pytest.raises(PeftfxError, match="the graph has no place for") as raised:
        peftfx.export_adapter(ours, tmp_path / "out", tmp_path / "x")
    assert hint in raised.value.hint
    assert ("--slots" in raised.value.hint) == (slots == "attention")


def test_a_tied_head_has_no_slot_for_a_copy(tmp_path: Path) -> None:
    """It would be the embedding's, too."""
    export_onnx(ZOO["gpt2"].build(), tmp_path / "out", slots="all-linear | head", view="forward")
    own = {slot.at for slot in Manifest.read(tmp_path / "out").slots if slot.what == SLOT_OWN}
    assert own
    assert not {"lm_head.weight", "transformer.wte.weight"} & own
    ours = peftfx.transform(ZOO["gpt2"].build(), peftfx.LoRA(modules_to_save=["lm_head"]))
    randomise(ours)
    with pytest.raises(PeftfxError, match=r"no place for .*lm_head") as raised:
        peftfx.export_adapter(ours, tmp_path / "out", tmp_path / "x")
    assert "--slots" not in raised.value.hint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slots_of_a_base_in_half_precision_are_held_to_its_own_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    """The capture and the model's own code were held to a bound of float32, and a slotted base was refused."""
    model = ZOO["gpt2"].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    export_onnx(model.to(dtype), tmp_path / "out", slots="all-linear", view="forward")
    if dtype == torch.float16:  # ONNX Runtime computes no bfloat16 on a CPU
        given = ZOO["gpt2"].inputs()
        with torch.no_grad():
            want = model.float()(**given).logits
        far = (runtime.load(tmp_path / "out")(**given).logits.float() - want).abs().max() / want.abs().max()
        assert far < 8 * torch.finfo(dtype).eps
