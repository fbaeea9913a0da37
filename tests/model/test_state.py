"""The state of an adapted model is its adapters alone: saved, copied, cast; and what makes an adapter."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted import QUERY_VALUE, adapt, both
from support.zoo import ZOO
from torch import nn
from torch.optim.swa_utils import AveragedModel

from peftfx.contract.method import Method
from peftfx.errors import PeftfxError
from peftfx.methods.adalora import AdaLoRA
from peftfx.methods.lora import LoRA
from peftfx.methods.psoft import PSOFT
from peftfx.model.adapted import AdaptedModel


class TestState:
    """The state of an AdaptedModel is its adapters'; copies are whole and independent."""

    def test_state_dict_holds_the_adapters_alone(self) -> None:
        adapted = adapt("bert", LoRA(modules_to_save=["classifier"]))
        state = adapted.state_dict()
        assert state.keys() == {f"adapters.{name}" for name, _ in adapted.adapters.named_parameters()}
        other = adapt("bert", LoRA(modules_to_save=["classifier"]))
        inputs = ZOO["bert"].inputs(model=adapted.base)
        with torch.no_grad():
            for p in other.adapters.parameters():
                p.zero_()
        other.load_state_dict({name: t.clone() for name, t in state.items()})
        assert torch.equal(other(**inputs).logits, adapted(**inputs).logits)

    @pytest.mark.parametrize(
        "method",
        [LoRA(r=4, init_lora_weights=how) for how in ("pissa", "pissa_niter_4", "olora", "mica")] + [PSOFT(r=4)],
        ids=["pissa", "pissa_niter_4", "olora", "mica", "psoft"],
    )
    def test_starts_from_a_decomposition_can_be_saved(self, method: Method, tmp_path: Path) -> None:
        """`Trainer` gives the state to safetensors, which refuses other strides than those of rows."""
        adapted = adapt("llama", method)
        save_file(adapted.state_dict(), tmp_path / "model.safetensors")
        assert load_file(tmp_path / "model.safetensors").keys() == adapted.state_dict().keys()

    def test_a_state_of_other_adapters_is_refused(self) -> None:
        adapted = adapt("custom", LoRA())
        state = adapted.state_dict()
        first = next(iter(state))
        with pytest.raises(PeftfxError, match="not of these adapters") as raised:
            adapted.load_state_dict(
                {**{k: v for k, v in state.items() if k != first}, "adapters.default.odd": torch.ones(1)}
            )
        assert first in str(raised.value)
        assert "adapters.default.odd" in str(raised.value)

    def test_a_state_of_an_adapter_of_another_name_is_told(self) -> None:
        """A trainer that resumes loads it without `strict`, and went on from the adapter's start."""
        saved = adapt("llama", LoRA(r=4), "first").state_dict()
        ours = adapt("llama", LoRA(r=4), "second")
        with pytest.warns(UserWarning, match="tensors of first are not loaded: the model has the adapters second"):
            ours.load_state_dict(saved, strict=False)
        with pytest.raises(PeftfxError, match="missing"):
            ours.load_state_dict(saved)

    def test_inside_another_module_it_leaves_the_others_state_alone(self) -> None:
        outer = nn.ModuleDict({"before": nn.Linear(2, 2), "model": adapt("custom", LoRA()), "after": nn.Linear(2, 2)})
        names = set(outer.state_dict())
        assert {"before.weight", "before.bias", "after.weight", "after.bias"} < names
        assert all(n.startswith("model.adapters.") for n in names if n.startswith("model."))

    @pytest.mark.parametrize("wrap", [lambda m: nn.Sequential(m, nn.Tanh()), AveragedModel], ids=["module", "average"])
    @pytest.mark.parametrize("rule", [LoRA(), AdaLoRA(total_step=9, tinit=1, tfinal=1)], ids=["lora", "adalora"])
    def test_a_module_around_it_loads_what_it_saved(self, wrap: Callable[[nn.Module], nn.Module], rule: Method) -> None:
        inputs = ZOO["custom"].inputs()
        outer, fresh = (wrap(adapt("custom", rule)) for _ in range(2))
        model = outer[0] if isinstance(outer, nn.Sequential) else outer.module
        model(**inputs).sum().backward()
        if isinstance(rule, AdaLoRA):
            model.update_and_allocate(1)  # what the method remembers is a part of the state
        with torch.no_grad():
            for p in model.adapters.parameters():
                p.mul_(1.5)
        state = outer.state_dict()
        assert str(fresh.load_state_dict(state)) == "<All keys matched successfully>"
        assert fresh.state_dict().keys() == state.keys()
        assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in state.items())
        gone = next(name for name in state if ".adapters." in name)
        with pytest.raises(RuntimeError, match=f"Missing key.*{gone}"):
            fresh.load_state_dict({name: tensor for name, tensor in state.items() if name != gone})

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_a_copy_is_whole_and_independent(self, how: Callable[[AdaptedModel], AdaptedModel]) -> None:
        adapted = adapt("bert", LoRA(modules_to_save=["classifier"]))
        inputs = ZOO["bert"].inputs(model=adapted.base)
        want = adapted(**inputs).logits
        other = how(adapted)
        assert torch.equal(other(**inputs).logits, want)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1)
        assert torch.equal(adapted(**inputs).logits, want)
        assert not torch.allclose(other(**inputs).logits, want)
        other.remove()
        assert adapted.names() == ("default",)

    @pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
    def test_after_a_cast_it_computes_in_the_new_dtype(self, dtype: torch.dtype, tmp_path: Path) -> None:
        ours, theirs = both("bert", tmp_path)
        inputs = ZOO["bert"].inputs(model=ours.base)
        before = ours(**inputs).logits
        got, want = ours.to(dtype)(**inputs).logits, theirs.to(dtype)(**inputs).logits
        assert got.dtype == ours.dtype == dtype
        # The scale is applied before the second factor and not after it, which in bfloat16 rounds otherwise.
        near = float(4 * torch.finfo(dtype).eps * want.abs().max()) if dtype == torch.bfloat16 else 1e-10
        torch.testing.assert_close(got, want, rtol=0, atol=near)
        back = ours.float()(**inputs).logits
        torch.testing.assert_close(back, before, rtol=0, atol=1e-6 if dtype == torch.float64 else 5e-2)

    def test_after_a_cast_an_image_model_still_merges(self) -> None:
        adapted = adapt("vit", LoRA()).to(torch.float64)
        pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        want = adapted(pixels).logits
        adapted.merge()
        torch.testing.assert_close(adapted.remove()(pixels).logits, want, rtol=0, atol=1e-5)

    def test_attributes_are_the_bases_and_methods_do_not_leak(self) -> None:
        adapted = adapt("llama", LoRA())
        base = adapted.base
        assert adapted.config is base.config
        assert (adapted.device, adapted.dtype) == (base.device, base.dtype)
        with pytest.raises(
            AttributeError, match=r"get_decoder\(\) of the base would run without the adapters: it gives"
        ):
            _ = adapted.get_decoder
        assert not hasattr(adapted, "get_decoder")
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = adapted.nonsense

    def test_the_graph_can_be_read(self, capsys: pytest.CaptureFixture[str]) -> None:
        adapted = adapt("custom", LoRA(target="attention.query"))
        text = adapted.print_readable()
        assert text.strip() in capsys.readouterr().out
        assert "def forward(self, ids" in text
        assert "self.adapters.default.a.lora_A" in text


class TestRules:
    """A rule is a method, a `peft` config, or several; one that cannot be followed says why."""

    def test_a_peft_config_is_a_rule(self, bare_bert: AdaptedModel) -> None:
        bare_bert.add_adapter("default", peft.LoraConfig(**QUERY_VALUE, lora_dropout=0.1, use_rslora=True))
        (rule,) = bare_bert.adapter("default").rules
        bare_bert.remove()
        assert rule == LoRA(r=4, lora_alpha=6, target_modules=("query", "value"), lora_dropout=0.1, use_rslora=True)

    def test_several_rules_make_one_adapter(self, bare_bert: AdaptedModel) -> None:
        bare_bert.add_adapter("default", [LoRA(r=2), LoRA(r=5, target="mlp")])
        ranks = {p.shape[0] for n, p in bare_bert.adapters.named_parameters() if n.endswith("lora_A")}
        bare_bert.remove()
        assert ranks == {2, 5}

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            (LoRA(target_modules=["querry"]), "matches no site.*querry.*did you mean 'query'"),
            (LoRA(target_modules="query"), "a regular expression for the whole name.*pass a list"),
            (LoRA(target="attention.quer"), "did you mean 'attention.query'"),
            ([LoRA(), LoRA(target="attention")], "two rules act here.*query.*narrow one"),
            (LoRA(target_modules=["classifier"], modules_to_save=["classifier"]), "every targeted module"),
            (LoRA(modules_to_save=["classifer"]), "no module is named classifer.*did you mean 'classifier'"),
            (peft.LoraConfig(**QUERY_VALUE, layer_replication=[(0, 1)]), "does not support layer_replication"),
            (peft.XLoraConfig(hidden_size=8, adapters={"a": "b"}), "XLORA"),
            ("attention.query", "unknown method 'attention'"),
            (7, "not a rule: 7"),
            ([], "there are no rules"),
        ],
        ids=["none here", "name", "role", "two", "saved", "module", "option", "method", "text", "number", "none"],
    )  # fmt: skip
    def test_what_cannot_be_followed_is_an_error(self, bare_bert: AdaptedModel, rules: object, message: str) -> None:
        with pytest.raises(PeftfxError, match=f"(?s){message}"):
            bare_bert.add_adapter("odd", rules)
        assert bare_bert.names() == ()

    def test_an_unknown_option_names_the_nearest(self) -> None:
        with pytest.raises(PeftfxError, match="did you mean 'lora_alpha'"):
            LoRA.from_options({"lora_alfa": 3})
        with pytest.raises(PeftfxError, match="did you mean 'r', 'rank_pattern'"):
            LoRA.from_options({"rank": 3})
