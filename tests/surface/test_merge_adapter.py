"""`merge_adapter` and `unmerge_adapter`: calls run merged weights, as in `peft`, and the very tensors come back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.adapted import adapt, randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.bases.guests import GUESTS, own_modules
from peftfx.errors import PeftfxError, PeftfxWarning


def held(base: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Every tensor, the object and its values, and the modules that hold it."""
    named = (*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False))
    return {name: (id(t), t.detach().clone()) for name, t in named if GUESTS not in name}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).view(2, 6)).logits


@pytest.fixture
def pair(tmp_path: Path) -> tuple[peftfx.AdaptedModel, nn.Module]:
    """Two adapters, `one` active: ours, and `peft`'s own."""
    theirs = peft.get_peft_model(
        ZOO["llama"].build(), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), "one"
    )
    theirs.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    for seed, name in enumerate(("two", "one")):
        theirs.set_adapter(name)
        randomise(theirs, seed)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(ZOO["llama"].build(), tmp_path / "one", "one")
    ours.load_adapter(tmp_path / "two", "two")
    ours.set_adapter("one")
    return ours.eval(), theirs.eval()


def test_as_in_peft(pair: tuple[peftfx.AdaptedModel, nn.Module]) -> None:
    ours, theirs = pair
    before, plain = held(ours.base), logits(ours)
    for names in (None, ["one"], ["two"]):
        for model in pair:
            model.merge_adapter(adapter_names=names)
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
        for tell in ("get_model_status", "get_layer_status"):
            got, want = (getattr(model, tell)() for model in pair)
            pairs = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
            assert all(set(g.merged_adapters) == set(w.merged_adapters) for g, w in pairs)
        assert type(ours.base.model.layers[0].self_attn.q_proj) is nn.Linear
        merged = logits(ours.base)  # the weights have it
        assert torch.equal(logits(ours), merged)
        if names == ["one"]:
            continue  # two comes on top of it
        for model in pair:
            model.unmerge_adapter()
        assert torch.equal(logits(ours), plain)
    assert ours.active_adapters == theirs.active_adapters == ["one"]
    with pytest.warns(PeftfxWarning, match="nothing to unmerge"):
        ours.unmerge_adapter()
    after = held(ours.base)
    assert after.keys() == before.keys()
    assert all(after[name][0] == before[name][0] and torch.equal(after[name][1], before[name][1]) for name in before)


def test_an_active_adapter_that_is_not_merged_is_told(pair: tuple[peftfx.AdaptedModel, nn.Module]) -> None:
    """HF PEFT runs it where nothing is merged: its layers without an adapter of `two`."""
    with pytest.warns(PeftfxWarning, match="merged base alone, without the active one"):
        pair[0].merge_adapter(["two"])
    assert torch.equal(logits(pair[0]), logits(pair[0].base))


@pytest.mark.parametrize(
    ("name", "road"),
    [("custom", None), ("gpt2", "graph"), *(pytest.param("t5", r, marks=pytest.mark.slow) for r in (None, "graph"))],
)
def test_the_very_tensors_come_back(name: str, road: str | None) -> None:
    rule = peftfx.LoRA(r=2, target="all-linear | conv | embedding.token", bias="all")
    model = adapt(name, rule, road=road).eval()
    given = ZOO[name].inputs(2, 6, model=model.base)
    leaf = lambda out: out if isinstance(out, Tensor) else out[0]  # noqa: E731
    before, want = held(model.base), leaf(model(**given)).detach()
    parts, config = [id(m) for _, m in own_modules(model.base)], copy.deepcopy(getattr(model.base, "config", None))
    model.merge_adapter()
    torch.testing.assert_close(leaf(model(**given)), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaf(model.base(**given)), want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    after = held(model.base)
    assert after.keys() == before.keys()
    assert all(after[n][0] == before[n][0] and torch.equal(after[n][1], before[n][1]) for n in before)
    assert torch.equal(leaf(model(**given)), want)
    assert [id(m) for _, m in own_modules(model.base)] == parts
    assert getattr(getattr(model.base, "config", None), "to_dict", dict)() == getattr(config, "to_dict", dict)()


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("llama", peftfx.LoRA(r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        ("bert", peftfx.LoRA(r=2, bias="all")),
    ],
)
def test_a_copy_that_tied_modules_share_is_merged_into_each(name: str, rule: peftfx.LoRA) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    more: dict[str, Any] = {**sizes, "num_attention_heads": 2, "tie_word_embeddings": True}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**more)) if name == "llama" else hf.BertForMaskedLM(hf.BertConfig(**more))
    model = peftfx.transform(base.eval(), rule)
    randomise(model.adapters)
    want = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(base), want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)


def test_what_needs_the_base_unmerges_first(tmp_path: Path) -> None:
    model = adapt("llama", peftfx.LoRA(r=2)).eval()
    want, tensors = logits(model), peftfx.get_peft_model_state_dict(model)
    with model.disable_adapter():
        plain = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)  # reads the base as it was, and leaves it merged
    assert model.named.folded == ("default",)
    torch.testing.assert_close(peftfx.get_peft_model_state_dict(model), tensors, rtol=0, atol=0)
    with pytest.raises(PeftfxError, match="unmerge_adapter"):
        model(**ZOO["llama"].inputs(2, 6, model=model.base), adapter_names=["default", "default"])
    with pytest.warns(PeftfxWarning, match="unmerged first"), model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    with pytest.warns(PeftfxWarning, match=r"an adapter is added: .* unmerged first"):
        model.load_adapter(tmp_path, "other")
    for work in (lambda: copy.deepcopy(model), model.merge_and_unload):
        model.merge_adapter()
        with pytest.warns(PeftfxWarning, match="unmerged first"):
            got = work()
        if work == model.merge_and_unload:
            torch.testing.assert_close(logits(got), want, rtol=0, atol=1e-5)


def test_what_cannot_be_merged_changes_nothing() -> None:
    model = adapt("llama", peftfx.PromptTuning(num_virtual_tokens=3)).eval()
    with pytest.raises(PeftfxError, match="soft prompt"):
        model.merge_adapter()
    model = adapt("llama", peftfx.LoRA(r=2, target="mlp.down")).eval()
    with torch.no_grad():
        next(model.adapters.parameters()).fill_(float("nan"))
    before = held(model.base)
    with pytest.raises(PeftfxError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert model.named.folded == ()
    assert all(held(model.base)[n][0] == before[n][0] for n in before)
    assert not torch.isfinite(logits(model)).all()


def test_other_values_are_loaded_into_an_adapter_that_is_not_merged(
    pair: tuple[peftfx.AdaptedModel, nn.Module],
) -> None:
    ours, _ = pair
    doubled = {name: 2 * value for name, value in ours.state_dict().items()}
    other = copy.deepcopy(ours)
    other.load_state_dict(doubled)
    ours.merge_adapter()
    with pytest.warns(PeftfxWarning, match="adapters get other values"):
        ours.load_state_dict(doubled)
    assert torch.equal(logits(ours), logits(other))


def test_a_merge_that_fails_leaves_the_same_adapters_active(pair: tuple[peftfx.AdaptedModel, nn.Module]) -> None:
    ours, _ = pair
    with torch.no_grad():
        next(ours.adapter("two").parameters()).fill_(torch.inf)
    with pytest.raises(PeftfxError):
        ours.merge_and_unload(adapter_names=["two"])
    assert ours.active == ("one",)


def test_an_adapter_of_a_name_that_was_deleted_acts_where_the_first_did_not() -> None:
    ours = adapt("llama", peftfx.LoRA(r=2, target="q_proj")).eval()
    (name,) = ours.names()
    ours.add_adapter("other", peftfx.LoRA(r=2, target="up_proj"))
    ours.set_adapter(name)
    plain = logits(ours)
    ours.delete_adapter(name)
    ours.add_adapter(name, peftfx.LoRA(r=2, target="up_proj"))
    ours.set_adapter(name)
    randomise(ours)
    assert not torch.allclose(logits(ours), plain)
    torch.testing.assert_close(logits(ours), logits(copy.deepcopy(ours).merge_and_unload()), rtol=0, atol=1e-5)
