"""What trainers and users do to a quantised base before training, and what peftfx leaves as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from quantised import in_memory as made
from support import quantised as q
from support.adapted import randomise
from torch import nn

import peftfx

pytest.importorskip("bitsandbytes")
IDS = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0))


def _int8() -> nn.Module:
    base = made.bitsandbytes8(q.tiny().to(torch.bfloat16))
    base.is_loaded_in_8bit = True  # as transformers marks it
    return base


@pytest.mark.parametrize("library", ["peft", "trl.experimental.utils"])
def test_a_base_is_prepared_after_it_is_adapted_as_before(library: str) -> None:
    """`prepare_model_for_kbit_training` freezes all that it gets: the adapters too, and nothing was trained."""
    prepare = pytest.importorskip(library).prepare_model_for_kbit_training
    seen = []
    for first in (True, False):
        base = prepare(_int8()) if first else _int8()
        model = peftfx.transform(base, "lora", seed=0).train()
        model = model if first else prepare(model)
        randomise(model.adapters)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert model.is_gradient_checkpointing
        assert all(p.requires_grad for p in model.adapters.parameters())
        seen.append({name: p.grad for name, p in model.adapters.named_parameters()})
        frozen = [p for name, p in model.named_parameters() if name.startswith("base.")]
        assert not any(p.requires_grad or p.grad is not None for p in frozen)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_4_bits_computes_in_the_dtype_of_its_own_first_input(bias: bool) -> None:
    """bitsandbytes keeps the dtype of the first input, which was that of the trial of the first layer of each kind."""
    base = q.tiny()
    if bias:
        for layer in base.model.layers:
            layer.mlp.up_proj.bias = nn.Parameter(torch.rand(layer.mlp.up_proj.out_features).bfloat16(), False)
    base = made.bitsandbytes4(base)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    before = {name: (p.dtype, p.data_ptr()) for name, p in base.named_parameters()}
    model = peftfx.transform(base, peftfx.LoRA(r=4, target_modules=["q_proj"]))
    layers = [module for module in base.modules() if hasattr(module, "compute_type_is_set")]
    assert {(layer.compute_dtype, layer.compute_type_is_set) for layer in layers} == {(None, False)}
    assert {name: (p.dtype, p.data_ptr()) for name, p in base.named_parameters() if name in before} == before
    seen = []
    for one in (model, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(one.train()(input_ids=IDS).logits)
    assert {layer.compute_dtype for layer in layers} == {
        module.compute_dtype for module in theirs.modules() if hasattr(module, "compute_type_is_set")
    }
    torch.testing.assert_close(*seen, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vera", "waveft"])
def test_constants_beside_tensors_that_trl_has_cast(name: str, tmp_path: Path) -> None:
    """TRL casts what is trained over a quantised base; calls ended in torch's error about two dtypes."""
    options = {"vera": {"r": 8, "save_projection": True}, "waveft": {"n_frequency": 40}}[name]
    config = {"vera": peft.VeraConfig, "waveft": peft.WaveFTConfig}[name](target_modules=["q_proj"], **options)
    theirs = peft.get_peft_model(made.bitsandbytes4(q.tiny()), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = peftfx.load(made.bitsandbytes4(q.tiny()), tmp_path)
    for one in (model, theirs):
        for p in one.parameters():
            p.data = p.data.bfloat16() if p.requires_grad else p.data
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.adapters.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "vera"):  # without it peft's ends in that error, too
        want = theirs.train()(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-3)
