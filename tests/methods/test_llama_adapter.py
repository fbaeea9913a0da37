"""LLaMA-Adapter gives `peft`'s numbers where `peft` has it, and those of the same formula by hand everywhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from methods.llama_adapter_by_hand import ByHand
from safetensors.torch import load_file
from support.few import but_for
from support.parity import outputs
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn

import peftfx
from peftfx import LlamaAdapter, LoRA, PeftfxError
from peftfx.bases.guests import own_parameters
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.model.adapted import AdaptedModel
from peftfx.passes import Remove

pytestmark = pytest.mark.further

COUNT = 4  #: tokens of a prompt
PEFT_HAS = ("llama", "mistral", "gpt2")


def theirs_on(base: nn.Module, layers: int = 1) -> nn.Module:
    """peft's model with a random prompt and an open gate."""
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=COUNT, adapter_layers=layers)
    made = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for seed, (name, p) in enumerate(made.named_parameters()):
            if "adaption_" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) + ("gate" in name))
    return made


def stirred(adapted: AdaptedModel, rules: object = None) -> AdaptedModel:
    """A model with an adapter by these rules alone, and everything that is trained off its start."""
    adapted.remove()
    adapted.add_adapter("default", rules or LlamaAdapter(adapter_len=COUNT), seed=0)
    adapted.eval()
    with torch.no_grad():
        for seed, p in enumerate(adapted.adapters.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return adapted


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    error = float((got - want).detach().abs().max())
    assert error <= tolerance * max(1.0, float(want.abs().max())), error


def close_all(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], tolerance)


@pytest.mark.parametrize("name", but_for({"mistral"}, PEFT_HAS))
def test_the_numbers_and_files_are_pefts(name: str, bare: Callable[[str], AdaptedModel], tmp_path: Path) -> None:
    ours, base = bare(name), ZOO[name].build()
    for layers in (1, 2):
        theirs = theirs_on(base, layers)
        theirs.save_pretrained(str(tmp_path / "theirs"))
        ours.remove()
        ours.load_adapter(tmp_path / "theirs", "default")
        ours.save_pretrained(tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
        mine, given = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
        assert mine.keys() == given.keys()
        assert all(torch.equal(mine[key], given[key]) for key in given)
        for batch, sequence in ((3, 5), (1, 1)):
            inputs = ZOO[name].inputs(batch, sequence, 4, model=base)
            want = outputs(theirs, inputs)
            assert float((want["logits"] - outputs(base, inputs)["logits"]).abs().max()) > 1e-3
            close_all(outputs(ours, inputs), want)
            close_all(outputs(back, inputs), want)
    ours.remove()


@pytest.mark.parametrize("name", but_for({"llama", "mistral"}, PEFT_HAS))
def test_ten_steps_are_those_of_peft(name: str) -> None:
    base = ZOO[name].build()
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=COUNT, adapter_layers=2),
    )
    ours = peftfx.transform(copy.deepcopy(base), theirs.peft_config["default"]).train()
    want = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if "adaption_" in n}
    got = dict(ours.adapter("default").named_parameters())
    with torch.no_grad():
        for key, p in got.items():
            p.copy_(want[key])
    for model in (ours.base, theirs.train()):
        model.apply(_without_dropout)
    inputs = ZOO[name].inputs(3, 6, model=base, labels=True)
    optimizers = [torch.optim.AdamW(list(p.values()), lr=1e-2) for p in (got, want)]
    for _ in range(10):
        losses = [model(**inputs).loss for model in (ours, theirs)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert all(p.grad is None for _, p in own_parameters(ours.base))
    assert all(float(p.detach().abs().max()) > 1e-3 for key, p in got.items() if "gate" in key)
    for key in want:
        close(got[key].detach(), want[key].detach())


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    if isinstance(getattr(module, "attention_dropout", None), float):
        module.attention_dropout = 0.0


QUICK = ("bloom", "gemma2", "bert", "deberta_v2", "t5")
MORE = (
    "gpt_neo",
    "phi3",
    "gpt_neox",
    "qwen3",
    "opt",
    "gpt_j",
    "falcon",
    "mpt",
    "albert",
    "bart",
    "whisper",
    "vit",
    "swin",
    "segformer",
    "clip",
    "unet",
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_elsewhere_it_is_the_same_formula(name: str, bare: Callable[[str], AdaptedModel]) -> None:
    ours = stirred(bare(name))
    hand, base = ByHand(name, ours), ours.base
    for batch, sequence in ((3, 5), (1, 1)):
        inputs = ZOO[name].inputs(batch, sequence, 4, model=base)
        with hand.hooked():
            want = outputs(base, inputs)
        close_all(outputs(ours, inputs), want)
        plain = outputs(base, inputs)
        assert any(float((want[key] - plain[key]).abs().max()) > 1e-3 for key in want)
    ours.remove()


def test_a_cross_attention_has_no_place_for_it(bare: Callable[[str], AdaptedModel]) -> None:
    adapted = bare("bart")
    adapted.add_adapter("default", LlamaAdapter())
    paths = {p.site.path for p in adapted.adapter("default").placements}
    assert len(paths) == 4
    assert not any("encoder_attn" in path for path in paths)
    adapted.remove()
    with pytest.raises(PeftfxError, match=r"it is a cross-attention.*model\.decoder\.layers\.0\.encoder_attn"):
        adapted.add_adapter("default", LlamaAdapter(target_modules="encoder_attn"))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda: LlamaAdapter(adapter_layers=3), "adapter_layers is 3, and the target has 2 attentions"),
        (lambda: LlamaAdapter(adapter_len=0), "adapter_len must be 1 or more"),
        (lambda: LlamaAdapter(target="mlp"), "picks only sites of kind linear"),
        (lambda: [LlamaAdapter(), LlamaAdapter(adapter_layers=1)], "two rules act here"),
    ],
)
def test_what_makes_no_sense_is_refused(
    rule: Callable[[], object], expected: str, bare: Callable[[str], AdaptedModel]
) -> None:
    with pytest.raises(PeftfxError, match=expected):
        bare("llama").add_adapter("default", rule())


def test_it_is_not_merged_into_weights(bare: Callable[[str], AdaptedModel]) -> None:
    adapted = stirred(bare("llama"), [LlamaAdapter(), LoRA()])
    before = {name: p.clone() for name, p in adapted.base.named_parameters()}
    with pytest.raises(PeftfxError, match="LlamaAdapter adds to an attention has no place in the base's weights"):
        adapted.merge()
    assert all(torch.equal(p, before[name]) for name, p in adapted.base.named_parameters())
    adapted.remove()


def test_it_uses_the_projections_as_they_are_adapted(bare: Callable[[str], AdaptedModel]) -> None:
    """As in peft, which calls the modules: a LoRA at keys and values adapts the prompt's too, in any order."""
    two = stirred(bare("llama"), [LlamaAdapter(adapter_len=COUNT), LoRA(r=3, target="attention")])
    adapter, inputs = two.adapter("default"), ZOO["llama"].inputs(3, 5, 4, model=two.base)
    got = outputs(two, inputs)
    two.remove()

    merged = peftfx.transform(ZOO["llama"].build(), LoRA(r=3, target="attention"))
    for key, value in merged.adapter("default").named_parameters():
        value.data.copy_(adapter.get(key))
    merged.merge()
    alone = peftfx.transform(merged.remove(), LlamaAdapter(adapter_len=COUNT)).eval()
    for key, value in alone.adapter("default").named_parameters():
        value.data.copy_(adapter.get(key))
    close_all(got, outputs(alone, inputs))

    names = {"lora": LoRA(r=3, target="attention"), "prompt": LlamaAdapter(adapter_len=COUNT)}
    for name, rule in names.items():
        two.add_adapter(name, rule)
        for key, value in two.adapter(name).named_parameters():
            value.data.copy_(adapter.get(key))
    for order in (("lora", "prompt"), ("prompt", "lora")):
        two.set_adapter(order)
        close_all(outputs(two, inputs), got)
        for kept, gone in (order, order[::-1]):
            two.set_adapter(order)
            left = Remove(gone)(two.graph()).graph
            two.set_adapter(kept)
            assert left.text() == two.graph().text()
            assert [len(s.calls) for s in left.sites] == [len(s.calls) for s in two.graph().sites]
        two.set_adapter(order)
        assert Remove()(two.graph()).graph.text() == two.graph(adapted=False).text()
    two.remove()


@pytest.mark.parametrize("order", [("lora", "prompt"), ("prompt", "lora")])
def test_behind_a_projection_it_joins_what_another_adapter_scales(order: tuple[str, str]) -> None:
    """GPT-2's prompt joins behind `c_proj`: what adapts that layer does not act on it, in any order."""
    base = ZOO["gpt2"].build()
    rules = {"prompt": LlamaAdapter(adapter_len=COUNT), "lora": LoRA(r=3, use_dora=True, target="attention.output")}
    two = peftfx.transform(base, rules[order[0]], adapter_name=order[0], seed=0).eval()
    two.add_adapter(order[1], rules[order[1]], seed=0)
    with torch.no_grad():
        for p in two.adapters.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    inputs = ZOO["gpt2"].inputs(3, 5, 4, model=base)
    two.set_adapter(order)
    got = outputs(two, inputs)
    theirs = theirs_on(base, 2)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "adaption_" in name:
                p.copy_(two.adapter("prompt").get(name.removeprefix("base_model.model.")))
    two.set_adapter("lora")
    two.merge()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "c_proj" in name and ".attn." in name:
                own = name.removeprefix("base_model.model.").replace(".attn.model.", ".attn.")
                p.copy_(dict(two.base.named_parameters())[own])
    close_all(got, outputs(theirs, inputs))


@pytest.mark.parametrize("name", but_for({"llama", "gpt2"}, ["llama", "gpt2"]))
def test_what_peft_wrote_is_exported_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    base = ZOO[name].build()
    theirs = theirs_on(base, 2)
    base.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(str(tmp_path / "adapter"))
    for merge in (True, False):
        out = tmp_path / str(merge)
        report = export_directory(tmp_path / "base", out, adapter=tmp_path / "adapter", merge=merge, view="forward")
        assert len(report.folded) == (4 if merge else 0)
        served = OnnxModel(out)
        for batch, sequence in ((3, 11), (1, 1)):
            inputs = ZOO[name].inputs(batch, sequence, 4, model=base)
            close_all(served(**inputs), outputs(theirs, inputs), 1e-4)


def test_with_lora_it_is_exported_merged_and_apart(bare: Callable[[str], AdaptedModel], tmp_path: Path) -> None:
    adapted = stirred(bare("gpt2"), [LlamaAdapter(adapter_len=COUNT), LoRA(r=3, target="attention | mlp")])
    inputs = ZOO["gpt2"].inputs(3, 9, 4, model=adapted.base)
    want = outputs(adapted, inputs)
    for merge in (True, False):
        report = adapted.export(tmp_path / str(merge), merge=merge, view="forward")
        assert (bool(report.merged), bool(report.folded)) == (merge, merge)
        close(OnnxModel(tmp_path / str(merge))(**inputs)["logits"], want["logits"], 1e-4)
    adapted.remove()


def test_a_bias_of_the_output_projection_is_added_once() -> None:
    """peft runs the projection on the second term, bias and all: a closed gate changes the output there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.LlamaConfig(**TOKENS, **sizes, attention_bias=True)
    base = hf.LlamaForCausalLM(config).eval()
    nn.init.normal_(base.model.layers[0].self_attn.o_proj.bias)
    inputs = {"input_ids": torch.arange(10, 16)[None]}
    plain = outputs(base, inputs)
    close_all(outputs(peftfx.transform(copy.deepcopy(base), LlamaAdapter()).eval(), inputs), plain)
    rule = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=COUNT, adapter_layers=1)
    theirs = peft.get_peft_model(copy.deepcopy(base), rule).eval()
    assert float((outputs(theirs, inputs)["logits"] - plain["logits"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", but_for({"gpt2"}, ["llama", "gpt2"]))
def test_it_generates_as_its_forward_says_and_onnx_runtime_does_too(
    name: str, bare: Callable[[str], AdaptedModel], tmp_path: Path
) -> None:
    adapted = stirred(bare(name))
    ids = torch.randint(4, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    want = ids
    with torch.no_grad():
        for _ in range(6):
            want = torch.cat([want, adapted(input_ids=want).logits[:, -1].argmax(-1, keepdim=True)], 1)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert adapted.generate(**prompt, **options).equal(want)
    assert not adapted(input_ids=ids).logits.allclose(adapted.base(input_ids=ids).logits)
    adapted.export(tmp_path / "out", view="decode")
    assert peftfx.runtime.load(tmp_path / "out").generate(**prompt, **options).equal(want)
    adapted.remove()


def test_a_plan_says_which_attentions_its_options_leave_out() -> None:
    plan = peftfx.plan(ZOO["llama"].build(), f"adaption_prompt(adapter_len={COUNT}, adapter_layers=1)")
    assert plan.parameters == COUNT * 32 + 1
    left = {site.path for why, sites in plan.rules[0].skipped.items() if "options" in why for site in sites}
    assert left == {"model.layers.0.self_attn"}
