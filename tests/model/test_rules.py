"""Rules: read from text and written, planned, mixed in one adapter, and saved for `peft` in a folder each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws.choices import CHOICES
from safetensors.torch import load_file, save_file
from support.adapted import randomise
from support.adapter_files import first, load_peft, same
from support.zoo import ZOO
from torch._subclasses.fake_tensor import FakeTensorMode

import peftfx
from peftfx import IA3, LoRA, PeftfxError, PrefixTuning, PromptTuning
from peftfx.contract.method import Method
from peftfx.methods import methods
from peftfx.model.adapted import AdaptedModel
from peftfx.rules.peft_files import RULES, WEIGHTS, rule_folders
from peftfx.rules.text import parse_rules, write_rule
from peftfx.testing.cases import configs, examples

every_method = pytest.mark.parametrize("cls", methods().values(), ids=methods())


class TestText:
    """A rule can be said in one line."""

    @pytest.mark.parametrize(
        ("text", "rules"),
        [
            ("lora", (LoRA(),)),
            ("LoRA(r=4)", (LoRA(r=4),)),
            (
                "lora(r=8)@attention.query; prefix_tuning(num_virtual_tokens=10)",
                (LoRA(r=8, target="attention.query"), PrefixTuning(num_virtual_tokens=10)),
            ),
            (" PrefixTuning ;ia3 @ mlp & ~/.*;0.*/;", (PrefixTuning(), IA3(target="mlp & ~/.*;0.*/"))),
            (
                "lora(target_modules=['q;)', \"v\"], rank_pattern={'(a|b)': 4}, bias='all')",
                (LoRA(target_modules=["q;)", "v"], rank_pattern={"(a|b)": 4}, bias="all"),),
            ),
        ],
    )
    def test_it_is_read(self, text: str, rules: tuple[Method, ...]) -> None:
        assert parse_rules(text) == rules

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("prefix_tunning", "unknown method.*did you mean 'prefix_tuning'"),
            ("lora(lora_alfa=2)", "no option 'lora_alfa'.*did you mean 'lora_alpha'"),
            ("lora(r='8')", r"the wrong type: r='8' \(int\)"),
            ("lora(use_dora=1)", r"the wrong type: use_dora=1 \(bool\)"),
            ("lora(bias=all)", "bias=all: not a Python literal.*write 'all'"),
            ("lora(r=open('x'))", "not a Python literal"),
            ("lora(8)", "options are given by name"),
            ("lora(r=8", "not closed"),
            ("lora(r=8) mlp", "expected '@', ';' or the end"),
            ("lora@ ; ia3", "expected a target"),
            ("lora(target='mlp')@mlp", "given twice"),
            ("lora(r=1, r=2)", "r is given twice"),
            ("", "expected the name of a method"),
        ],
    )
    def test_what_cannot_be_read_says_where_and_what_is_near(self, text: str, message: str) -> None:
        with pytest.raises(PeftfxError, match=f"(?s){message}"):
            parse_rules(text)

    @every_method
    @examples(6)
    @given(data=st.data())
    def test_what_is_written_is_read_as_the_same_rule(self, cls: type[Method], data: st.DataObject) -> None:
        rule = data.draw(configs(cls, CHOICES.get(cls.peft_type)))
        assert parse_rules(write_rule(rule)) == (rule,)


class TestPlan:
    """A plan says what `transform` then does."""

    @pytest.mark.parametrize("name", ["gpt2", "bert"])
    def test_it_counts_what_transform_makes(self, name: str) -> None:
        rules = "lora(r=3, bias='all', modules_to_save=['lm_head', 'classifier'])@attention.query | mlp; prompt_tuning"
        plan = peftfx.plan(ZOO[name].build(), rules)
        adapted = peftfx.transform(ZOO[name].build(), rules)
        assert (plan.parameters, plan.total) == adapted.get_nb_trainable_parameters()
        roles = {p.view.role for p in adapted.adapter("default").placements}
        assert {role for rule in plan.rules for role in rule.touched} == roles

    def test_it_says_of_every_site_why_it_is_skipped(self) -> None:
        model = ZOO["bert"].build()
        rule = LoRA(target="attention | mlp", layers_to_transform=[1], exclude_modules=["key"])
        (plan,) = peftfx.plan(model, rule).rules
        skipped = {site.path.rpartition("bert.")[2]: why for why, sites in plan.skipped.items() for site in sites}
        assert skipped["encoder.layer.1.attention.self.key"] == "exclude_modules matches its path"
        assert skipped["encoder.layer.0.attention.self.query"] == "its layer is not in layers_to_transform"
        assert skipped["classifier"] == "the target does not match its path or role"
        assert "its kind, attention," in skipped["encoder.layer.0.attention.self"]
        assert len(skipped) + sum(t.places for t in plan.touched.values()) == len(peftfx.inspect(model))
        assert all(why in str(plan) for why in plan.skipped)

    def test_a_model_without_memory_is_planned_for(self) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = ZOO["llama"].make()
        assert peftfx.plan(model, LoRA(init_lora_weights="pissa")).parameters == 2 * 8 * (64 + 48)

    def test_what_cannot_be_done_is_refused_as_by_transform(self) -> None:
        with pytest.raises(PeftfxError, match="two rules act here"):
            peftfx.plan(ZOO["bert"].build(), "lora; ia3@attention.query")


MIXED = "lora(r=3)@attention.query | attention.output; ia3@mlp.down; lora(r=2, use_dora=True)@mlp.up"


def adapt(name: str, rules: object) -> AdaptedModel:
    adapted = peftfx.transform(ZOO[name].build(), rules, seed=0)
    randomise(adapted)
    return adapted


class TestMixed:
    """Different methods at different sites in one adapter."""

    @pytest.mark.parametrize("name", ["gpt2", "bert"])
    def test_each_folder_is_an_adapter_of_pefts_and_together_they_are_ours(self, name: str, tmp_path: Path) -> None:
        """peft has no mix of these methods: it merges one after the other into a base."""
        ours = adapt(name, MIXED)
        inputs = ZOO[name].inputs(3, 5, 4, model=ours.base)
        want = first(ours, inputs)
        ours.save_pretrained(tmp_path)
        folders = json.loads((tmp_path / RULES).read_text(encoding="utf-8"))["rules"]
        assert folders == ["1-lora", "2-ia3", "3-lora"]
        theirs = ZOO[name].build()
        for folder in folders:
            theirs = load_peft(theirs, tmp_path / folder).merge_and_unload()
        same(first(theirs, inputs), want)
        ours.remove()
        ours.load_adapter(tmp_path, "default")
        same(first(ours, inputs), want)
        assert [type(rule) for rule in ours.adapter("default").rules] == [LoRA, IA3, LoRA]
        ours.merge()
        same(first(ours.remove(), inputs), want)

    def test_rules_commute(self) -> None:
        rules = parse_rules("lora(r=2)@attention.query; ia3@attention.value; lora(use_dora=True)@mlp.up")
        one, other = adapt("gpt2", rules), adapt("gpt2", rules[::-1])
        with torch.no_grad():
            for key, value in other.adapter("default").named_parameters():
                value.copy_(one.adapter("default").get(key))
        inputs = ZOO["gpt2"].inputs(2, 6, 1, model=one.base)
        assert torch.equal(first(one, inputs), first(other, inputs))

    def test_a_prompt_beside_weights_and_a_head_is_saved_and_trained_on(self, tmp_path: Path) -> None:
        rules = [PromptTuning(num_virtual_tokens=3), LoRA(r=2, modules_to_save=["classifier"])]
        ours = adapt("bert", rules)
        inputs = ZOO["bert"].inputs(2, 6, 1, model=ours.base, labels=True)
        ours.save_pretrained(tmp_path)
        want = first(ours, inputs)
        ours.remove()
        ours.load_adapter(tmp_path, "default")
        same(first(ours, inputs), want)
        ours.train()(**inputs).loss.backward()
        assert all(p.grad is not None for p in ours.adapters.parameters())

    def test_each_folder_has_the_head_and_two_heads_are_refused(self, tmp_path: Path) -> None:
        ours = adapt("bert", [PromptTuning(num_virtual_tokens=3), LoRA(r=2, modules_to_save=["classifier"])])
        ours.save_pretrained(tmp_path)
        prompt, lora = (load_file(folder / WEIGHTS) for folder in rule_folders(tmp_path))
        head = ours.adapter("default").get("saved.classifier.weight")
        assert torch.equal(prompt["base_model.classifier.weight"], head)
        assert torch.equal(lora["base_model.model.classifier.weight"], head)
        save_file({**prompt, "base_model.classifier.weight": head + 1}, tmp_path / "1-prompt_tuning" / WEIGHTS)
        with pytest.raises(PeftfxError, match=r"other values of classifier\.weight.*2-lora"):
            ours.load_adapter(tmp_path, "again")

    def test_what_was_there_before_is_not_mistaken_for_it(
        self, bare: Callable[[str], AdaptedModel], tmp_path: Path
    ) -> None:
        mixed, plain, loaded = adapt("bert", MIXED), adapt("bert", LoRA(r=2)), bare("bert")
        inputs = ZOO["bert"].inputs(2, 6, 1, model=plain.base)
        for saved in (mixed, plain, mixed):
            saved.save_pretrained(tmp_path)
            loaded.load_adapter(tmp_path, "default")
            same(first(loaded, inputs), first(saved, inputs))
            loaded.remove()

    def test_rules_on_parts_of_one_module_cannot_be_saved_apart(self, tmp_path: Path) -> None:
        ours = peftfx.transform(ZOO["gpt2"].build(), "lora@attention.query; lora(r=2)@attention.value")
        with pytest.raises(PeftfxError, match=r"know no parts.*h\.0\.attn\.c_attn"):
            ours.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_list_of_folders_elsewhere_is_refused(self, tmp_path: Path) -> None:
        for text in ('{"rules": ["../else"]}', '{"rules": []}', "{}", "["):
            (tmp_path / RULES).write_text(text, encoding="utf-8")
            with pytest.raises(PeftfxError, match="save the adapter again"):
                rule_folders(tmp_path)

    def test_named_adapters_of_different_methods_are_switched_and_disabled(self) -> None:
        ours = adapt("bert", MIXED)
        inputs = ZOO["bert"].inputs(2, 6, 1, model=ours.base)
        seen = {("default",): first(ours, inputs)}
        for name, rule in {"scale": "ia3@attention.key", "prompt": "prompt_tuning(num_virtual_tokens=3)"}.items():
            ours.add_adapter(name, rule)
            randomise(ours)
            seen[name,] = first(ours, inputs)
        ours.set_adapter(["default", "scale", "prompt"])
        seen[ours.active] = first(ours, inputs)
        with ours.disable_adapter():
            seen[()] = first(ours, inputs)
        ours.set_adapter("default")
        assert torch.equal(first(ours, inputs), seen["default",])
        values = list(seen.values())
        assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(values) for b in values[:i])
        assert torch.equal(first(copy.deepcopy(ours.remove()), inputs), seen[()])


def test_a_layer_that_is_the_model_itself_has_no_copies() -> None:
    """Their only name is the path of the layer, and it has none. LoRA's tensors have names of their own."""
    inputs = {"input": torch.randn(2, 4)}
    for model, rule in (
        (torch.nn.LayerNorm(4), peftfx.LNTuning()),
        (torch.nn.Linear(4, 4), peftfx.BitFit(target="head")),
    ):
        with pytest.raises(PeftfxError, match="the model itself is a targeted layer"):
            peftfx.transform(model, rule, inputs=inputs)
    assert peftfx.transform(torch.nn.Linear(4, 4), LoRA(r=2, target="head"), inputs=inputs)(**inputs).shape == (2, 4)
