"""Training loops as they are written for HF PEFT: they call its tuner, `base_model`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adamss.asa_callback import AdamssAsaCallback
from support.adapted import randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError

ADALORA = peftfx.AdaLoRA(init_r=4, target_r=2, total_step=99, tinit=1, tfinal=2, target_modules=["q_proj", "up_proj"])
ADAMSS = peftfx.AdaMSS(
    r=8,
    num_subspaces=4,
    use_asa=True,
    asa_target_subspaces=2,
    init_warmup=1,
    final_warmup=5,
    mask_interval=1,
    target_modules=["q_proj"],
)
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"]}


def given(model: nn.Module) -> dict[str, Tensor]:
    return ZOO["llama"].inputs(2, 6, model=model, labels=True)


def states(model: peftfx.AdaptedModel) -> dict[str, Tensor]:
    return {
        **model.state_dict(),
        **{f"{n} is trained": torch.tensor(p.requires_grad) for n, p in model.named_parameters()},
    }


@pytest.mark.parametrize("road", ["modules", "graph"])
@pytest.mark.parametrize("rule", [ADALORA, ADAMSS], ids=["AdaLoRA", "AdaMSS"])
def test_base_model_gives_out_ranks_as_the_model_does(rule: object, road: str) -> None:
    """A callback of `peft` asked `base_model` whether it can, and left it out without a word."""
    base = ZOO["llama"].build()
    first, second, never = (peftfx.transform(copy.deepcopy(base), rule, seed=3, road=road) for _ in range(3))
    callback = AdamssAsaCallback()
    for model in (first, second, never):
        if rule is ADALORA:
            model.base_model.peft_config["default"].total_step = 6
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(6):
            model.train()(**given(base)).loss.backward()
            optimizer.step()
            if model is first:
                model.update_and_allocate(step)
            elif model is second:
                callback.on_optimizer_step(None, SimpleNamespace(global_step=step), None, model=model)
            optimizer.zero_grad()
    torch.testing.assert_close(states(second), states(first), rtol=0, atol=0)
    assert any(not torch.equal(tensor, states(first)[name]) for name, tensor in states(never).items())
    assert first.peft_config["default"].to_dict().get("total_step") == (6 if rule is ADALORA else None)


def test_base_model_is_the_inner_model_in_all_else() -> None:
    base = ZOO["llama"].build()
    ours = peftfx.transform(base, ADALORA)
    assert isinstance(ours.base_model, type(base.model))
    assert ours.base_model.layers is base.model.layers
    assert ours.base_model.model is base
    assert ours.base_model.model.model.layers[0] is base.model.layers[0]
    assert torch.equal(ours.base_model(torch.tensor([[3, 5]]))[0], base.model(torch.tensor([[3, 5]]))[0])
    with pytest.raises(PeftfxError, match="no steps in which ranks are cut"):
        ours.base_model.peft_config["default"].total_step = 1
    with pytest.raises(AttributeError, match="update_and_allocate"):
        _ = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA()).base_model.update_and_allocate
    custom = ZOO["custom"]
    plain = peftfx.transform(custom.build(), peftfx.AdaLoRA(total_step=9, target="all-linear"), inputs=custom.inputs())
    assert plain.base_model.update_and_allocate == plain.update_and_allocate
    plain.base_model.delete_adapter("default")
    assert not plain.names()
    assert not hasattr(plain.base_model, "update_and_allocate")


@pytest.mark.parametrize("road", ["modules", "graph"])
def test_adapters_are_set_merged_and_deleted_on_base_model(road: str) -> None:
    """transformers' own methods of these names answered, that the version of PEFT is not compatible."""
    ours = peftfx.transform(ZOO["llama"].build(), peft.LoraConfig(**LORA), road=road).eval()
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(**LORA)).eval()
    for model in (ours, theirs):
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"]))
    for name in ("default", "two"):
        theirs.base_model.set_adapter(name)
        randomise(theirs, len(name))
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        peftfx.set_peft_model_state_dict(ours, state, name)
    call = given(ours.base)
    steps: list[Callable[[Any], object]] = [
        lambda tuner: tuner.set_adapter(["default", "two"]),
        lambda tuner: tuner.merge_adapter(),
        lambda tuner: tuner.unmerge_adapter(),
        lambda tuner: tuner.delete_adapter("default"),
    ]
    for step in steps:
        for model in (ours, theirs):
            step(model.base_model)
        want = theirs.base_model(**call).logits  # PeftModel still asks for the config of the deleted one
        torch.testing.assert_close(ours(**call).logits, want, rtol=0, atol=1e-5)
        assert ours.base_model.active_adapters == theirs.base_model.active_adapters
    assert ours.base_model.active_adapter == theirs.base_model.active_adapters == ["two"]
    for model in (ours, ours.base_model):
        with pytest.raises(AttributeError, match=r"with model.disable_adapter\(\)"):
            model.disable_adapter_layers()
    assert torch.equal(ours.base_model.unload()(**call).logits, ZOO["llama"].build().eval()(**call).logits)
