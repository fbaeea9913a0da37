"""Bases that are quantised in memory: adapters train inside their own layers, are saved, merged and exported."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from quantised import in_memory as made
from support import quantised as q
from support.adapted import randomise
from support.few import but_further
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.onnx_directory import export_onnx
from peftfx.export.reports.report import Report
from peftfx.model.adapted import AdaptedModel

IDS = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0))
RULE = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
LAYERS = {
    "gptq": (q.gptq(), {"bits": 4, "group_size": 32}),
    "awq": (q.awq(), {"bits": 4, "group_size": 32}),
    "fp8": (q.fp8((32, 32)), {}),
}
PACKAGES = {
    "nf4": ("bitsandbytes", made.bitsandbytes4),
    "fp4": ("bitsandbytes", lambda model: made.bitsandbytes4(model, "fp4", double=False)),
    "int8": ("bitsandbytes", made.bitsandbytes8),
    "int8 in calls": ("bitsandbytes", lambda model: made.bitsandbytes8(model, late=True)),
    "torchao int8": ("torchao", lambda model: made.torchao(model, "int8")),
    "torchao int4": ("torchao", lambda model: made.torchao(model, "int4")),
    "torchao fp8": ("torchao", lambda model: made.torchao(model, "fp8")),
    "quanto int8": ("optimum.quanto", lambda model: made.quanto(model, "qint8")),
    "quanto int4": ("optimum.quanto", lambda model: made.quanto(model, "qint4")),
    "own class": ("torch", made.self_dequantised),
}


def adapted(base: nn.Module, rule: object = None) -> AdaptedModel:
    model = peftfx.transform(base, rule or peftfx.LoRA(**RULE), seed=0)
    randomise(model)
    return model.train()


def step(model: AdaptedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients by the names in a file."""
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = copy.deepcopy(model.adapter("default"))
    with torch.no_grad():
        for (_, one), (_, own) in zip(gradients.named_parameters(), model.adapters.named_parameters(), strict=True):
            one.copy_(own.grad)
    model.adapters.add_module("default", gradients)
    return loss.detach(), peftfx.get_peft_model_state_dict(model)


def step_of_peft(model: peft.PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients by the names in a file; some have `.weight` behind the name."""
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    held = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), held


def test_a_method_that_reads_a_weight_reads_what_the_codes_stand_for(tmp_path: Path) -> None:
    """The oracle is `peft` over the dequantised weights: over the codes, it leaves their scales out."""
    pytest.importorskip("bitsandbytes")
    base, plain = made.bitsandbytes8(q.tiny(num_hidden_layers=1)), q.tiny(num_hidden_layers=1)
    for path, layer in base.named_modules():
        if isinstance(layer, nn.Linear) and path != "lm_head":
            plain.get_submodule(path).weight.data = layer.weight.data * layer.weight.SCB.reshape(-1, 1) / 127
    theirs = peft.get_peft_model(plain, peft.HRAConfig(r=4, target_modules=RULE["target_modules"]))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    (loss, gradients), (want, others) = step(peftfx.load(base, tmp_path).train()), step_of_peft(theirs)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients, others)


@pytest.mark.parametrize("kind", ["gptq", pytest.param("awq", marks=pytest.mark.slow), "fp8"])
def test_a_quantised_layer_is_trained_through_as_the_weight_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    pack, said = LAYERS[kind]
    base, plain = made.packed(pack, **said)
    model, want = adapted(base), adapted(plain)
    assert model.road == "modules"
    model.save_pretrained(tmp_path)
    loaded = peftfx.load(made.packed(pack, **said)[0], tmp_path)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, want(input_ids=IDS).logits)
    (loss, gradients), (other, others) = step(model), step(want)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradients, others)


def test_merging_puts_torchs_own_layers_in_the_places_of_those_that_an_adapter_acts_in() -> None:
    base, plain = made.packed(*LAYERS["gptq"][:1], **LAYERS["gptq"][1])
    model, want = adapted(base), adapted(plain)
    report = model.eval().merge()
    want.merge()
    assert type(base.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(base.model.layers[0].mlp.up_proj) is made.PackedLinear
    assert report.worst[1].max_abs == 0
    assert "no longer quantised (GPTQ int4): 3 layers" in str(report)
    torch.testing.assert_close(base(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_an_export_has_the_codes_as_they_are_and_a_merged_one_floats(tmp_path: Path) -> None:
    base, _ = made.packed(*LAYERS["gptq"][:1], **LAYERS["gptq"][1])
    model = adapted(base).eval()
    beside = export_onnx(model, tmp_path / "beside", view="forward")
    merged = export_onnx(model, tmp_path / "merged", view="forward", merge=True)
    assert _coded(beside) == 7
    assert _coded(merged) == 4
    assert model.training is False
    assert all(p.requires_grad for p in model.adapters.parameters())


def _coded(report: Report) -> int:
    return sum(len(choice.weights) for choices in report.codes.values() for choice in choices)


def test_a_layer_that_is_quantised_in_an_unknown_way_is_refused() -> None:
    base = made.replaced(
        q.tiny(num_hidden_layers=1),
        lambda own: made.PackedLinear({"weight": own.weight.to(torch.int8)}, own.weight, None),
    )
    with pytest.raises(PeftfxError, match=r"quantised in this way: a PackedLinear with weight"):
        peftfx.transform(base, "lora")


def test_a_layer_of_an_unknown_class_whose_tensors_have_known_names_is_refused_by_its_class() -> None:
    base = made.replaced(
        q.tiny(num_hidden_layers=1),
        lambda own: made.PackedLinear(
            {"weight": own.weight.to(torch.uint8), "weight_scale": torch.ones(1)}, own.weight, None
        ),
    )
    with pytest.raises(PeftfxError, match=r"dtype uint8 \[a PackedLinear in memory: .*\n  hint: use the unquantised"):
        peftfx.transform(base, "lora")


@pytest.mark.parametrize("kind", ["Embedding4bit", "Embedding8bit"])
def test_a_quantised_embedding_in_memory_is_refused(kind: str) -> None:
    """bitsandbytes' own refuse to say what they hold: that was the error."""
    bnb = pytest.importorskip("bitsandbytes")
    base = q.tiny(num_hidden_layers=1)
    own = base.model.embed_tokens
    base.model.embed_tokens = getattr(bnb.nn, kind)(own.num_embeddings, own.embedding_dim)
    base.model.embed_tokens.load_state_dict(own.state_dict())
    base.model.embed_tokens.to("cpu")
    with pytest.raises(PeftfxError, match=rf"quantised in this way: a {kind} with weight"):
        peftfx.inspect(base)


def test_a_conv_of_a_packages_own_class_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    weight = made.SelfDequantised(torch.ones(3, 2, 1, 1, dtype=torch.int8), torch.ones(3, 1, 1, 1))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(PeftfxError, match="quantised in this way: a Conv2d with weight"):
        peftfx.inspect(model, inputs={"input": torch.randn(1, 2, 2, 2)})


def test_a_layer_that_computes_something_else_than_its_codes_is_refused() -> None:
    base, _ = made.packed(*LAYERS["gptq"][:1], **LAYERS["gptq"][1])
    for module in base.modules():
        if isinstance(module, made.PackedLinear):
            module.value = (module.value[0] + 1,)
    with pytest.raises(PeftfxError, match="does not compute what its codes, read as GPTQ int4, say"):
        peftfx.inspect(base)


def test_a_layer_of_one_size_that_computes_something_else_than_its_codes_is_refused() -> None:
    """As bitsandbytes 0.50 does on a CPU, where the columns are no multiple of its blocks: other sizes are right."""
    base, _ = made.packed(*LAYERS["gptq"][:1], **LAYERS["gptq"][1])
    broken = base.model.layers[0].mlp.down_proj
    broken.value = (broken.value[0] + 1,)
    with pytest.raises(PeftfxError, match=r"PackedLinear of \[\d+, \d+\] does not compute") as told:
        peftfx.inspect(base)
    assert told.value.where == "model.layers.0.mlp.down_proj"


def test_a_layer_without_a_gradient_keeps_to_the_graph_and_says_so() -> None:
    base, plain = made.packed(*LAYERS["gptq"][:1], **LAYERS["gptq"][1])
    for module in base.modules():
        if isinstance(module, made.PackedLinear):
            module.register_forward_hook(lambda module, args, y: y.detach())
    with pytest.warns(PeftfxWarning, match="over dequantised weights.*has no gradient"):
        model = adapted(base)
    assert model.road == "graph"
    (loss, gradients), (other, others) = step(model), step(adapted(plain))
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradients, others)


def test_the_gradient_of_a_bias_is_not_taken_for_one_of_the_layers_product() -> None:
    """Its output has a gradient, and its input has none: layers before it were not trained through it."""
    base, plain = made.packed(*LAYERS["gptq"][:1], **LAYERS["gptq"][1])
    for model in (base, plain):
        for layer in model.model.layers:
            for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
                module.bias = nn.Parameter(torch.ones(64))
                if model is base:
                    module.register_forward_pre_hook(lambda module, args: args[0].detach())
    with pytest.warns(PeftfxWarning, match="over dequantised weights.*has no gradient"):
        model = adapted(base)
    (_, gradients), (_, others) = step(model), step(adapted(plain))
    torch.testing.assert_close(gradients, others)


@pytest.mark.parametrize("kind", but_further({"fp4"}, PACKAGES))
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_loss_and_gradients_are_those_of_peft_on_the_same_base(
    kind: str, options: dict[str, bool], tmp_path: Path
) -> None:
    package, quantise = PACKAGES[kind]
    pytest.importorskip(package)
    if options and kind == "int8 in calls":
        pytest.skip("peft does not find the scales of such weights")
    model = adapted(quantise(q.tiny()), peftfx.LoRA(**RULE, **options))
    assert model.road == "modules"
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(quantise(q.tiny()), tmp_path, is_trainable=True)
    (loss, gradients), (want, others) = step(model), step_of_peft(theirs)
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=0)
    others = {name if name in gradients else name.removesuffix(".weight"): grad for name, grad in others.items()}
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - others[name]).abs().max() <= 2e-6 * others[name].abs().max()


def test_a_prefix_is_measured_without_a_change_to_layers_of_8_bits() -> None:
    """The first call of such a layer moves its codes and scales: a run on fake tensors must not be the first."""
    pytest.importorskip("bitsandbytes")
    base = made.bitsandbytes8(q.tiny())
    model = adapted(base, peftfx.PrefixTuning(num_virtual_tokens=3)).eval()
    model(input_ids=IDS)
    with model.disable_adapter():
        got = model(input_ids=IDS).logits
    torch.testing.assert_close(got, made.bitsandbytes8(q.tiny()).eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", but_further({"fp4"}, PACKAGES))
def test_a_package_s_base_is_exported_as_it_is_and_merged(kind: str, tmp_path: Path) -> None:
    package, quantise = PACKAGES[kind]
    pytest.importorskip(package)
    base = quantise(q.tiny())
    model = adapted(base)
    want = model.floating()(input_ids=IDS).logits
    assert _coded(export_onnx(model, tmp_path / "out", view="forward")) == 14
    assert len(model.merge().dequantised) == 6
    got = model.train()(input_ids=IDS).logits
    torch.testing.assert_close(got, want, atol=2e-2 if kind == "int8" else 1e-5, rtol=0)


def test_a_base_in_bfloat16_is_merged_in_bfloat16_and_the_rounding_told() -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted(made.bitsandbytes4(q.tiny().to(torch.bfloat16)))
    want = model.floating()(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits.float(), want, atol=2e-2, rtol=0)
    report = model.merge()
    assert 0 < report.worst[1].max_rel < 4e-3
    assert model.base.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_torchaos_dynamic_int8_has_no_gradient_of_its_own() -> None:
    pytest.importorskip("torchao")
    with pytest.warns(PeftfxWarning, match="has no gradient"):
        model = adapted(made.torchao(q.tiny(), "dynamic"))
    _, gradients = step(model)
    assert all(bool(gradient.any()) for gradient in gradients.values())
