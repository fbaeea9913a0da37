"""Adapters whose files have tensors for modules that their own config leaves out: as in HF PEFT, they do not act."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapted import randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.export import OnnxModel
from peftfx.export.merge_command import merge_directory

FURTHER = pytest.mark.further
CHANGES: dict[str, dict[str, object]] = {
    "modules": {"target_modules": ["q_proj"]},
    "pattern": {"target_modules": r".*\.q_proj"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "layers": {"layers_to_transform": [0]},
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15).view(2, 6)).logits


def saved(directory: Path, change: dict[str, object]) -> Path:
    """An adapter at queries and values of all layers, whose config was changed afterwards."""
    made = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    randomise(made)
    made.save_pretrained(directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return directory


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_the_config_leaves_out_does_not_act_and_is_told(change: dict[str, object], tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", change)
    with pytest.warns(UserWarning, match=r"the adapter's config leaves out the modules of model\.layers"):
        ours = peftfx.load(ZOO["llama"].build(), adapter)
    theirs = peft.PeftModel.from_pretrained(ZOO["llama"].build(), adapter)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == again.keys()


@pytest.mark.parametrize("change", [n if n == "layers" else pytest.param(n, marks=FURTHER) for n in CHANGES])
@pytest.mark.parametrize("merge", [True, False])
def test_it_is_exported_verified_as_peft_computes(change: str, merge: bool, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", CHANGES[change])
    theirs = peft.PeftModel.from_pretrained(ZOO["llama"].build(), adapter)
    with pytest.warns(UserWarning, match="the adapter's config leaves out"):
        ours = peftfx.load(ZOO["llama"].build(), adapter)
    report = ours.export(tmp_path / "out", view="forward", merge=merge)
    assert report.reference.startswith("the model's own code, with the adapter on its modules")
    for batch, length in ((2, 6), (1, 3)):
        ids = torch.arange(3, 3 + batch * length).view(batch, length)
        with torch.no_grad():
            want = theirs.eval()(input_ids=ids).logits
        got = OnnxModel(tmp_path / "out")(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_it_is_merged_verified_as_peft_merges(tmp_path: Path) -> None:
    ZOO["llama"].build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapter = saved(tmp_path / "adapter", CHANGES["excluded"])
    theirs = peft.PeftModel.from_pretrained(ZOO["llama"].build(), adapter).merge_and_unload()
    with pytest.warns(UserWarning, match="the adapter's config leaves out"):
        merge_directory(tmp_path / "base", tmp_path / "out", adapter=adapter)
    got = type(theirs).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(got), logits(theirs), rtol=0, atol=1e-5)


def test_a_config_that_leaves_out_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="leave out every module of the file"):
        peftfx.load(ZOO["llama"].build(), saved(tmp_path, {"target_modules": "q_proj"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"lora_alpha": None}, "lora_alpha is null"), ({"peft_type": "lora"}, "did you mean .*LORA")],
)
def test_a_number_that_is_null_and_a_type_in_small_letters_are_refused(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(PeftfxError, match=said):
        peftfx.load(ZOO["llama"].build(), saved(tmp_path, change))


def test_a_start_that_is_null_is_none() -> None:
    """HF PEFT takes it for `False`: no factor is set to zero, so the new adapter changes the outputs."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=None)
    base, theirs = ZOO["llama"].build(), peft.get_peft_model(ZOO["llama"].build(), config)
    plain = logits(base)
    ours = peftfx.transform(base, config)
    assert float((logits(ours) - plain).abs().max()) > 1e-3
    assert float((logits(theirs) - plain).abs().max()) > 1e-3
