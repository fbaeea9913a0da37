"""What layers of a PeftModel say beside its files: scales set by hand, and adapters that act in some of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from support.adapted import randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.errors import PeftfxWarning

pytestmark = pytest.mark.further

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, alpha_pattern={"v_proj": 9}),
    "rsLoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "LoHa": peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS, init_weights=False),
    "LoKr": peft.LoKrConfig(r=4, alpha=6, target_modules=TARGETS, init_weights=False),
}


def _adapted(config: peft.PeftConfig) -> Any:
    model = peft.get_peft_model(ZOO["llama"].build(), config).eval()
    randomise(model)
    return model


def _layers(model: nn.Module, part: str = "") -> Iterator[Any]:
    return (m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and part in name)


def _inputs(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(2, 60, (rows, 7), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _compare(ours: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for rows in (1, 3):
            want = model(**_inputs(rows)).logits
            torch.testing.assert_close(ours(**_inputs(rows)).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_scale_that_was_set_is_taken_over_and_saved(name: str, tmp_path: Path) -> None:
    model = _adapted(CONFIGS[name])
    plain = peftfx.transform(model)
    for layer in _layers(model):
        layer.set_scale("default", 0.3)
    for layer in _layers(model, "layers.1"):
        layer.scale_layer(0.5)
    ours = peftfx.transform(model)
    _compare(ours, model)
    assert not torch.allclose(plain(**_inputs(1)).logits, ours(**_inputs(1)).logits, atol=1e-3)
    ours.save_pretrained(tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / "saved").eval()
    _compare(again, model)


def test_an_adalora_divides_by_its_rank() -> None:
    model = _adapted(peft.AdaLoraConfig(init_r=6, target_r=3, target_modules=TARGETS, total_step=10))
    _compare(peftfx.transform(model), model)
    for layer in _layers(model):
        layer.set_scale("default", 0.3)
    with pytest.raises(PeftfxError, match="a layer of adapter 'default' has the scale"):
        peftfx.transform(model)


def test_what_is_told_of_a_file_names_the_adapter() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    model = peft.get_peft_model(ZOO["gemma"].build(), config, adapter_name="mine")
    with pytest.warns(PeftfxWarning, match="^adapter 'mine': ensure_weight_tying") as told:
        peftfx.transform(model)
    texts = [str(warning.message) for warning in told if issubclass(warning.category, PeftfxWarning)]
    assert len(texts) == len(set(texts))


def test_scales_for_a_while_and_a_config_that_was_changed_later() -> None:
    model = _adapted(CONFIGS["LoRA"])
    with rescale_adapter_scale(model, 0.5):
        _compare(peftfx.transform(model), model)
    model.peft_config["default"].lora_alpha = 60  # PEFT reads it once
    _compare(peftfx.transform(model), model)


def _in_one_layer(call: Callable[[Any], object]) -> Any:
    model = _adapted(CONFIGS["LoRA"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    _compare(peftfx.transform(model), model)
    for layer in _layers(model, "layers.1"):
        call(layer)
    return model


def test_adapters_that_act_in_some_layers_alone_are_refused() -> None:
    model = _in_one_layer(lambda layer: layer.set_adapter(["second"]))
    with pytest.raises(PeftfxError, match="adapter 'default' acts in 3 of its 6 layers"):
        peftfx.transform(model)
    model.set_adapter("default")
    _compare(peftfx.transform(model), model)
    model = _in_one_layer(lambda layer: layer.enable_adapters(False))
    with pytest.raises(PeftfxError, match="adapters are disabled in 3 of its 6 layers alone"):
        peftfx.transform(model)
    model.disable_adapter_layers()
    _compare(peftfx.transform(model), model)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_peft_model_trains_the_biases_of_its_base_on(bias: str) -> None:
    model = peft.get_peft_model(ZOO["gpt2"].build(), peft.LoraConfig(r=3, bias=bias, target_modules=["c_attn"]))
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("bias") for name in before)
    ours = peftfx.transform(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    model(**_inputs(2)).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in before)
    assert any(name.endswith("bias") and p.requires_grad for name, p in ours.named_parameters())


def test_a_file_is_not_loaded_onto_layers_of_peft(tmp_path: Path) -> None:
    model = _adapted(CONFIGS["LoRA"])
    model.save_pretrained(tmp_path)
    with pytest.raises(PeftfxError, match=r"(?s)does not fit.*has layers of peft in it: load the file onto the model"):
        peftfx.load(model.get_base_model(), tmp_path)


def test_pefts_names_are_told_what_they_are_here() -> None:
    with pytest.raises(AttributeError, match=r"'get_peft_model': peftfx\.transform does that"):
        peftfx.get_peft_model  # noqa: B018
    with pytest.raises(AttributeError, match="takes the configs of peft as they are"):
        peftfx.LoraConfig  # noqa: B018
    assert not hasattr(peftfx, "nothing")
