"""Layers of 4 bits that bitsandbytes repacks in a call in eval mode: calls, gradients, merges and exports after one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from quantised import in_memory as made
from support import quantised as q
from support.adapted import randomise
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxWarning
from peftfx.model.adapted import AdaptedModel
from peftfx.twins.layers import codes_in
from peftfx.twins.repacked import ROUNDED, is_repacked
from peftfx.views.prefix import cache_shape

bnb = pytest.importorskip("bitsandbytes")
packing = pytest.mark.skipif(
    not getattr(bnb.functional, "has_avx512bf16", lambda: False)(), reason="bitsandbytes repacks for AVX512-BF16 alone"
)
IDS = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0))
KINDS = [
    *(("nf4", False), ("fp4", True)),
    *(pytest.param(kind, double, marks=pytest.mark.further) for kind, double in (("nf4", True), ("fp4", False))),
]
RULE = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def base(kind: str = "nf4", double: bool = False) -> nn.Module:
    return made.bitsandbytes4(q.tiny(), kind, double=double).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.fixture(params=[{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = peftfx.transform(q.tiny(), peftfx.LoRA(**RULE, **request.param), seed=0)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(to: nn.Module, saved: Path) -> AdaptedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        return peftfx.load(to, saved)


@packing
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_call_in_eval_mode_computes_what_the_codes_say(kind: str, double: bool, saved: Path) -> None:
    model = load(base(kind, double), saved)
    first = logits(model)
    assert is_repacked(model.base.model.layers[0].self_attn.q_proj)
    want = logits(model.floating())
    assert (first - want).abs().max() < 3e-2 * want.abs().max()
    torch.testing.assert_close(logits(model), first, atol=0, rtol=0)
    one = logits(model, IDS[:1, :5])
    assert (one - logits(model.floating(), IDS[:1, :5])).abs().max() < 3e-2 * want.abs().max()


@pytest.mark.parametrize("double", [False, True])
def test_sizes_that_cannot_be_repacked_compute_in_their_plain_form(double: bool) -> None:
    """bitsandbytes ended with `N must be divisible by block_n`, in `peft` and without adapters too."""
    plain = q.tiny(hidden_size=24, intermediate_size=36, num_attention_heads=2)
    model = peftfx.transform(made.bitsandbytes4(plain, double=double).eval(), peftfx.LoRA(**RULE), seed=0)
    randomise(model)
    assert model.road == "modules"
    torch.testing.assert_close(logits(model), logits(model.floating()), atol=1e-5, rtol=0)
    with torch.no_grad():
        model.train()(input_ids=IDS)


@packing
def test_a_lora_in_eval_mode_is_that_of_peft_and_reads_no_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peftfx.transform(base(), peftfx.LoRA(**RULE), seed=0)
    randomise(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    monkeypatch.setattr("peftfx.twins.layers.codes_in", lambda *_: pytest.fail("codes are read"))
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-6, rtol=0)


@packing
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_training_and_merges_after_a_call_are_those_before_it(kind: str, double: bool, saved: Path) -> None:
    fresh, used = load(base(kind, double), saved).train(), load(base(kind, double), saved)
    want = logits(used.floating())
    logits(used)
    for model in (fresh, used.train()):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for own, other in zip(used.adapters.parameters(), fresh.adapters.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=0, rtol=0)
    logits(used)
    copied = copy.deepcopy(used)
    for model in (copied, used):
        logits(model)
        report = model.merge()
        assert ROUNDED not in str(report)
        model.train()
        torch.testing.assert_close(model(input_ids=IDS).logits, want, atol=1e-5, rtol=0)


@packing
def test_in_eval_mode_a_gradient_passes_layers_that_were_repacked_before(saved: Path) -> None:
    fresh, used = load(base(), saved), load(base(), saved)
    logits(used)
    for model in (fresh, used):
        for ids in (IDS, IDS[:1, :4]):
            model.eval()(input_ids=ids, labels=ids).loss.backward()
    assert is_repacked(used.base.model.layers[0].self_attn.q_proj)  # its input has no gradient
    assert not is_repacked(used.base.model.layers[1].self_attn.k_proj)
    for own, other in zip(used.adapters.parameters(), fresh.adapters.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=2e-2 * float(other.grad.abs().max()), rtol=0)


@packing
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_over_a_base_that_has_run_the_rounded_scales_are_told(kind: str, double: bool, tmp_path: Path) -> None:
    ran = base(kind, double)
    logits(ran)
    with pytest.warns(PeftfxWarning, match="rounded the scales of .* to bfloat16"):
        model = peftfx.transform(ran, peftfx.LoRA(**RULE), seed=0)
    randomise(model)
    assert model.road == "modules"
    report = model.export(tmp_path / "out", view="forward")
    assert ROUNDED in str(report)
    assert ROUNDED in str(model.merge())


@packing
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_base_that_is_saved_after_a_call_has_its_own_scales(kind: str, double: bool, saved: Path) -> None:
    fresh, used = base(kind, double), load(base(kind, double), saved)
    logits(used)
    want, found = fresh.state_dict(), used.unload().state_dict()
    assert want.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


@packing
def test_a_file_with_scales_out_of_order_is_read_in_order(saved: Path, tmp_path: Path) -> None:
    ran = base()
    want = logits(load(base(), saved).floating())
    logits(ran)
    ran.state_dict()
    for module in ran.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            held = module.weight.quant_state.as_dict(packed=True)  # what a file has
            module.weight.quant_state = bnb.functional.QuantState.from_dict(held, torch.device("cpu"))
    with pytest.warns(PeftfxWarning, match="rounded the scales of"):
        model = peftfx.load(ran, saved)
    torch.testing.assert_close(logits(model.floating()), want, atol=2e-2 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("spoiled", [False, True], ids=["packed", "after state_dict"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_repacked_codes_are_read_exactly_and_the_layer_left_alone(kind: str, double: bool, spoiled: bool) -> None:
    pack = getattr(bnb.functional, "_convert_weight_packed_for_cpu", None)
    if pack is None or (spoiled and double):
        pytest.skip("bitsandbytes does not repack, or rounds the scales once more")
    layer = base(kind, double).model.layers[1].mlp.up_proj
    plain = codes_in(layer, "", {})
    codes, scales = plain.packed().clone(), plain.magnitudes()
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    if spoiled:
        layer.state_dict()
    held = layer.weight.data
    found = codes_in(layer, "", {})
    assert layer.weight.data.data_ptr() == held.data_ptr()
    assert torch.equal(found.packed(), codes)
    assert torch.equal(found.magnitudes(), scales.bfloat16().float())
    assert found.format.endswith(ROUNDED)


@packing
@pytest.mark.parametrize("training", [True, False])
def test_a_prefix_is_measured_on_layers_that_stay_as_they_are(training: bool, tmp_path: Path) -> None:
    rule = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base(), rule)
    theirs.save_pretrained(tmp_path)
    model = peftfx.load(base(), tmp_path)
    layer = model.base.model.layers[0].self_attn.q_proj
    before = layer.weight.data
    cache_shape(model.base, False)
    assert layer.weight.data.shape == before.shape
    assert not is_repacked(layer)
    losses = [m.train(training)(input_ids=IDS, labels=IDS).loss for m in (theirs, model)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=0)


@packing
@pytest.mark.parametrize("double", [False, True])
def test_a_state_is_read_and_loaded_without_asking_the_base(double: bool) -> None:
    """The state of a repacked layer makes bitsandbytes put it back, with scales that it rounds once more."""
    model = peftfx.transform(base(double=double), peftfx.LoRA(**RULE), seed=0)
    randomise(model)
    first = logits(model)
    assert is_repacked(model.base.model.layers[0].self_attn.q_proj)
    for whole in (model, nn.ModuleDict({"within": model})):
        state = whole.state_dict()
        assert state
        assert not any(".base." in f".{name}" for name in state)
        assert torch.equal(logits(model), first)
        whole.load_state_dict(state)
        assert torch.equal(logits(model), first)
