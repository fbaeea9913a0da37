"""LoRAs on an embedding's weight as a parameter (`target_parameters`), held to `peft`: these were refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapted import randomise, trained
from support.zoo import ZOO

import peftfx
from peftfx.errors import PeftfxError
from peftfx.model.adapted import AdaptedModel

FURTHER = pytest.mark.further
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("llama", {"target_parameters": ["embed_tokens.weight"]}),
    "beside modules": ("llama", {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]}),
    "a scaled one": ("gemma2", {"target_parameters": ["embed_tokens.weight"]}),
    "with the tied head": ("gemma2", {"target_parameters": ["embed_tokens.weight", "lm_head.weight"]}),
    "beside a copied head": ("gemma2", {"target_parameters": ["embed_tokens.weight"], "modules_to_save": ["lm_head"]}),
    "of positions": ("gpt2", {"target_parameters": ["wte.weight", "wpe.weight"]}),
    "of two tied ones": ("t5", {"target_parameters": ["embed_tokens.weight"]}),
}
FEW = ("alone", "with the tied head")
EACH = [pytest.param(*case, id=n, marks=() if n in FEW else FURTHER) for n, case in CASES.items()]


def config(options: dict[str, Any]) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [], **options})


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def saved(model: AdaptedModel | peft.PeftModel, directory: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(str(directory))
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("road", ["modules", "graph"])
@pytest.mark.parametrize(("name", "options"), EACH)
def test_steps_outputs_and_files_are_those_of_peft(
    name: str, options: dict[str, Any], road: str, tmp_path: Path
) -> None:
    base = ZOO[name].build()
    given = ZOO[name].inputs(2, 6, model=base, labels=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config(options)).eval()
    start = saved(theirs, tmp_path / "start")
    new = saved(peftfx.transform(copy.deepcopy(base), config(options)), tmp_path / "new")
    assert {k: (v.shape, bool(v.any())) for k, v in new.items()} == {
        k: (v.shape, bool(v.any())) for k, v in start.items()
    }
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "start", road=road).eval()
    got, want = (trained(model, lambda model=model: model(**given).loss) for model in (ours, theirs))
    assert got == pytest.approx(want, abs=1e-6)
    randomise(theirs)
    tensors = saved(theirs, tmp_path / "theirs")
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs", road=road).eval()
    close(ours(**given).logits, theirs(**given).logits)
    torch.testing.assert_close(saved(ours, tmp_path / "ours"), tensors, rtol=0, atol=0)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    close(again(**given).logits, theirs(**given).logits)
    close(ours.merge_and_unload()(**given).logits, theirs(**given).logits)


@pytest.mark.parametrize("merge", [True, False])
def test_it_is_exported(merge: bool, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), config(CASES["alone"][1]))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = peftfx.load(ZOO["llama"].build(), tmp_path / "adapter")
    report = ours.export(tmp_path / "onnx", view="forward", merge=merge)
    assert report.reference.startswith("the model's own code, with the adapter on its modules")


def test_what_needs_a_layer_is_refused() -> None:
    with pytest.raises(PeftfxError, match="cannot have use_dora"):
        peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(target_parameters=["embed_tokens.weight"], use_dora=True))
