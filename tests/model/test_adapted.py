"""What `transform` returns: called as the base is, trained as `peft` trains, switched, merged and taken off again."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from support.adapted import CONVS, QUERY_VALUE, Convs, adapt, both, gradients, our_name, randomise
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import peftfx
from peftfx.errors import PeftfxError
from peftfx.methods.lora import LoRA
from peftfx.model import graph_cache
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.views.view import without_cache


@contextlib.contextmanager
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The inputs of each capture that an AdaptedModel makes inside."""
    made: list[object] = []
    real = graph_cache.capture

    def counting(model: nn.Module, inputs: Mapping[str, object], **options: object) -> object:
        made.append(dict(inputs))
        return real(model, inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(graph_cache, "capture", counting)
        yield made


@pytest.fixture(scope="module")
def gpt2() -> AdaptedModel:
    """With a fresh adapter, which changes nothing: outputs are the base's own."""
    return peftfx.transform(ZOO["gpt2"].build(), LoRA())


@pytest.fixture(scope="module")
def bare_bert() -> AdaptedModel:
    """Captured once; a test that adds adapters takes them off again."""
    return bare(ZOO["bert"].build())


class TestCall:
    """A call takes what the base takes and returns what the base returns."""

    @pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}], ids=str)
    def test_keywords(self, gpt2: AdaptedModel, options: dict[str, bool]) -> None:
        inputs = ZOO["gpt2"].inputs(3, 9, model=gpt2.base)
        with without_cache(gpt2.base):
            want = gpt2.base(**inputs, **options)
        got = gpt2(**inputs, **options)
        assert type(got) is type(want)
        assert list(got) == list(want)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)

    def test_labels_give_the_loss(self, gpt2: AdaptedModel) -> None:
        inputs = ZOO["gpt2"].inputs(model=gpt2.base, labels=True)
        assert "labels" in inputs
        got, want = gpt2(**inputs), gpt2.base(**inputs)
        torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=1e-6)
        assert next(iter(got)) == "loss"

    def test_positions(self, gpt2: AdaptedModel) -> None:
        ids = ZOO["gpt2"].inputs(model=gpt2.base)["input_ids"]
        torch.testing.assert_close(gpt2(ids).logits, gpt2.base(ids).logits, rtol=0, atol=1e-6)

    def test_return_dict_false_gives_a_tuple(self, gpt2: AdaptedModel) -> None:
        ids = ZOO["gpt2"].inputs(model=gpt2.base)["input_ids"]
        got = gpt2(ids, return_dict=False)
        assert type(got) is tuple
        torch.testing.assert_close(got[0], gpt2.base(ids, return_dict=False)[0], rtol=0, atol=1e-6)

    def test_embeddings_instead_of_ids(self, gpt2: AdaptedModel) -> None:
        embeddings = torch.randn(2, 7, 32)
        got, want = gpt2(inputs_embeds=embeddings), gpt2.base(inputs_embeds=embeddings)
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-6)

    def test_too_many_arguments_are_a_type_error(self, gpt2: AdaptedModel) -> None:
        with pytest.raises(TypeError, match="positional arguments"):
            gpt2(*[None] * 50)

    def test_a_number_in_kwargs_does_not_capture_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        adapted = adapt("llama", LoRA())
        inputs = ZOO["llama"].inputs(model=adapted.base, labels=True)
        with captures(monkeypatch) as made:
            losses = [adapted(**inputs, num_items_in_batch=n).loss.item() for n in (6, 12, 24)]
        assert len(made) == 1
        assert losses == pytest.approx([losses[0], losses[0] / 2, losses[0] / 4])

    def test_sizes_do_not_capture_again_and_an_image_of_another_size_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapted = peftfx.transform(ZOO["segformer"].build(), LoRA(target="all-linear"))
        with captures(monkeypatch) as made:
            for batch, size in ((1, 32), (3, 32), (2, 64), (1, 64)):
                pixels = torch.randn(batch, 3, size, size)
                torch.testing.assert_close(adapted(pixels).logits, adapted.base(pixels).logits, rtol=0, atol=1e-5)
        assert [c["pixel_values"].shape[-1] for c in made] == [64]

    def test_a_layer_that_runs_twice_has_one_adapter(self, tmp_path: Path) -> None:
        ours, theirs = both("albert", tmp_path)
        site = next(s for s in ours.sites if s.role == "attention.query")
        assert len(site.calls) == 2
        inputs = ZOO["albert"].inputs(3, 5, model=ours.base)
        assert len(list(ours.adapters.parameters())) == 4
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-5)


class TestFirstCall:
    """A graph does not depend on the context in which it is first needed."""

    @pytest.mark.parametrize("context", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode])
    def test_training_works_after_a_first_call_without_gradients(
        self, context: Callable[[], contextlib.AbstractContextManager[object]]
    ) -> None:
        adapted = adapt("llama", LoRA())
        inputs = ZOO["llama"].inputs(model=adapted.base, labels=True)
        with context():
            first = adapted(**inputs).loss
        assert not first.requires_grad
        second = adapted(**inputs).loss
        second.backward()
        assert second.item() == first.item()
        assert all(float(p.grad.abs().max()) > 0 for p in adapted.adapters.parameters() if p.grad is not None)
        assert len(gradients(adapted)) == len(list(adapted.adapters.parameters()))

    def test_autocast_computes_what_peft_does_under_autocast(self, tmp_path: Path) -> None:
        ours, theirs = both("bert", tmp_path)
        inputs = ZOO["bert"].inputs(model=ours.base)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got, want = ours(**inputs).logits, theirs(**inputs).logits
        assert got.dtype == want.dtype == torch.bfloat16
        # The scale is applied in another place, so the two round otherwise: by two units in the last place at most.
        assert float((got.float() - want.float()).abs().max()) <= 2**-6 * float(want.abs().max())
        with torch.no_grad():
            assert ours(**inputs).logits.dtype == torch.float32


DROPPED = [{"use_dora": True}, {"modules_to_save": ["classifier"], "bias": "all"}, {"bias": "lora_only"}]


class TestTraining:
    """Training is `peft`'s training: the same loss and the same gradients from the same seed."""

    @pytest.mark.parametrize("options", DROPPED, ids=str)
    def test_dropout_loss_and_gradients_are_those_of_peft(self, tmp_path: Path, options: dict[str, object]) -> None:
        ours, theirs = both("bert", tmp_path, lora_dropout=0.3, **options)
        inputs = ZOO["bert"].inputs(model=ours.base, labels=True)
        losses = []
        for model in (ours, theirs):
            model.train()
            torch.manual_seed(3)
            loss = model(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
        want = {our_name(name): grad for name, grad in gradients(theirs).items()}
        got = {name.removeprefix("adapters.default."): grad for name, grad in gradients(ours).items()}
        assert got.keys() == want.keys()
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    def test_train_and_eval_switch_dropout_exactly(self) -> None:
        adapted = adapt("bert", LoRA(lora_dropout=0.5))
        inputs = ZOO["bert"].inputs(model=adapted.base)
        quiet = adapted(**inputs).logits
        adapted.train()
        assert not torch.equal(adapted(**inputs).logits, quiet)
        adapted.eval()
        assert torch.equal(adapted(**inputs).logits, quiet)

    def test_a_part_of_the_base_can_be_in_another_mode(self) -> None:
        adapted = adapt("custom", LoRA())
        inputs = ZOO["custom"].inputs()
        quiet = adapted(**inputs)
        adapted.train()
        assert not torch.equal(adapted(**inputs), quiet)
        adapted.base.drop.eval()
        assert torch.equal(adapted(**inputs), quiet)

    @pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
    def test_only_adapter_parameters_are_trained(self, bias: str, bare_bert: AdaptedModel) -> None:
        bare_bert.add_adapter("default", LoRA(bias=bias, modules_to_save=["classifier"]))
        trained = {name for name, p in bare_bert.named_parameters() if p.requires_grad}
        own = {f"adapters.{name}" for name, _ in bare_bert.adapters.named_parameters()}
        bare_bert.remove()
        assert trained == own
        biases = {n for n in trained if n.endswith("query.bias")}
        others = {n for n in trained if n.endswith("dense.bias")}
        assert (bool(biases), bool(others)) == (bias != "none", bias == "all")
        assert {n for n in trained if "classifier" in n} == {
            "adapters.default.saved.classifier.weight",
            "adapters.default.saved.classifier.bias",
        }

    def test_the_base_does_not_change_when_the_adapter_trains(self) -> None:
        adapted = adapt("bert", LoRA(bias="all", modules_to_save=["classifier"])).train()
        before = {name: t.clone() for name, t in adapted.base.state_dict().items()}
        optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
        inputs = ZOO["bert"].inputs(model=adapted.base, labels=True)
        adapters = {name: t.clone() for name, t in adapted.state_dict().items()}
        for _ in range(2):
            adapted(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(t, before[name]) for name, t in adapted.base.state_dict().items())
        assert not any(torch.equal(t, adapters[name]) for name, t in adapted.state_dict().items())

    def test_a_fresh_head_trains_and_is_saved(self, tmp_path: Path) -> None:
        adapted = peftfx.transform(ZOO["bert"].build(), LoRA(modules_to_save=["classifier"])).train()
        inputs = ZOO["bert"].inputs(model=adapted.base, labels=True)
        adapted(**inputs).loss.backward()
        with torch.no_grad():
            for p in adapted.adapters.parameters():
                p.sub_(p.grad)
        adapted.eval().save_pretrained(tmp_path)
        loaded = peftfx.load(ZOO["bert"].build(), tmp_path)
        theirs = peft.PeftModel.from_pretrained(ZOO["bert"].build(), str(tmp_path))
        head = loaded.adapter("default").get("saved.classifier.weight")
        assert torch.equal(head, adapted.adapter("default").get("saved.classifier.weight"))
        assert not torch.equal(head, loaded.base.classifier.weight)
        want = adapted(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, want, rtol=0, atol=0)
        torch.testing.assert_close(theirs(**inputs).logits, want, rtol=0, atol=1e-5)

    def test_gradient_checkpointing_is_refused(self) -> None:
        with pytest.raises(PeftfxError, match="checkpointing"):
            adapt("custom", LoRA()).gradient_checkpointing_enable()


COUNTED = [{}, {"r": 16, "use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["classifier"]}]


@pytest.mark.parametrize("options", COUNTED, ids=str)
def test_trainable_parameters_are_counted_as_peft_counts(
    options: dict[str, object], bare_bert: AdaptedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    config = peft.LoraConfig(**{**QUERY_VALUE, **options})
    bare_bert.add_adapter("default", config)
    bare_bert.print_trainable_parameters()
    bare_bert.remove()
    ours = capsys.readouterr().out
    peft.get_peft_model(ZOO["bert"].build(), config).print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert ours.startswith("trainable params: ")


@pytest.fixture
def two(bare_bert: AdaptedModel) -> Iterator[tuple[AdaptedModel, dict[str, Tensor]]]:
    """Two adapters on one model, the second active, and inputs."""
    for name, rule in (("first", LoRA(r=2)), ("second", LoRA(r=3, target="attention | mlp"))):
        bare_bert.add_adapter(name, rule)
        randomise(bare_bert)
    yield bare_bert, ZOO["bert"].inputs(model=bare_bert.base)
    bare_bert.remove()


class TestSeveralAdapters:
    """Adapters come and go by name; several may act at once."""

    def test_two_active_ones_add_up_as_in_peft(self, tmp_path: Path) -> None:
        theirs = peft.get_peft_model(ZOO["bert"].build(), peft.LoraConfig(**QUERY_VALUE), adapter_name="one")
        theirs.add_adapter("two", peft.LoraConfig(**{**QUERY_VALUE, "r": 3, "target_modules": "all-linear"}))
        theirs.base_model.set_adapter(["one", "two"])
        randomise(theirs)
        theirs.save_pretrained(str(tmp_path))
        ours = peftfx.load(ZOO["bert"].build(), tmp_path / "one", "one")
        ours.load_adapter(tmp_path / "two", "two")
        inputs = ZOO["bert"].inputs(model=ours.base)
        seen = []
        for names in (["one", "two"], ["one"], ["two"], ["two", "one"]):
            ours.set_adapter(names)
            theirs.base_model.set_adapter(names)
            seen.append(ours(**inputs).logits)
            torch.testing.assert_close(seen[-1], theirs.eval()(**inputs).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(seen[0], seen[1])
        ours.set_adapter(["one", "two"])
        ours.merge()
        torch.testing.assert_close(ours.remove()(**inputs).logits, seen[0], rtol=0, atol=1e-5)

    def test_the_active_ones_are_trained(self, two: tuple[AdaptedModel, dict[str, Tensor]]) -> None:
        adapted, _ = two
        for active in (("first",), ("second",), ("first", "second")):
            adapted.set_adapter(active)
            trained = {name.split(".")[1] for name, p in adapted.named_parameters() if p.requires_grad}
            assert trained == set(active)

    def test_disabled_it_is_the_base_and_then_adapted_again(self, two: tuple[AdaptedModel, dict[str, Tensor]]) -> None:
        adapted, inputs = two
        want, plain = adapted(**inputs).logits, adapted.base(**inputs).logits
        with contextlib.suppress(KeyError), adapted.disable_adapter():
            assert torch.equal(adapted(**inputs).logits, plain)
            raise KeyError("an error inside")
        assert torch.equal(adapted(**inputs).logits, want)
        assert not torch.allclose(want, plain)

    def test_one_can_be_removed(self, two: tuple[AdaptedModel, dict[str, Tensor]]) -> None:
        adapted, inputs = two
        adapted.set_adapter("first")
        want = adapted(**inputs).logits
        adapted.set_adapter(["first", "second"])
        adapted.remove("second")
        assert adapted.names() == adapted.active == ("first",)
        assert torch.equal(adapted(**inputs).logits, want)
        adapted.add_adapter("second", LoRA(r=5))
        assert adapted.active == ("second",)

    def test_one_can_be_merged_and_the_other_goes_on(self, two: tuple[AdaptedModel, dict[str, Tensor]]) -> None:
        adapted, inputs = copy.deepcopy(two[0]), two[1]
        adapted.set_adapter(["first", "second"])
        want = adapted(**inputs).logits
        adapted.set_adapter("first")
        adapted.merge()
        assert adapted.names() == ("second",)
        adapted.set_adapter("second")
        torch.testing.assert_close(adapted(**inputs).logits, want, rtol=0, atol=1e-5)

    def test_names_are_checked(self, two: tuple[AdaptedModel, dict[str, Tensor]]) -> None:
        adapted, _ = two
        with pytest.raises(PeftfxError, match="already an adapter named 'first'"):
            adapted.add_adapter("first", LoRA())
        with pytest.raises(PeftfxError, match="did you mean 'first'"):
            adapted.set_adapter("frist")
        with pytest.raises(PeftfxError, match="not a name"):
            adapted.add_adapter("a.b", LoRA())
        with pytest.raises(PeftfxError, match="every torch module has an attribute 'train'"):
            adapted.add_adapter("train", LoRA())
        with pytest.raises(PeftfxError, match="acts once"):
            adapted.set_adapter(["first", "first"])
        with pytest.raises(PeftfxError, match="no adapter named 'third'"):
            adapted.remove("third")
        assert (adapted.names(), adapted.active) == (("first", "second"), ("second",))


def test_a_model_is_frozen_when_it_gets_its_first_adapter_and_not_before() -> None:
    base = ZOO["custom"].build()
    peftfx.inspect(base, inputs=ZOO["custom"].inputs())
    assert all(p.requires_grad for p in base.parameters())
    adapted = bare(base, ZOO["custom"].inputs())
    assert adapted.remove() is base
    assert all(p.requires_grad for p in base.parameters())
    for _ in range(2):
        adapted.add_adapter("default", LoRA())
        assert not any(p.requires_grad for p in base.parameters())
        adapted.remove()
        assert all(p.requires_grad for p in base.parameters())


def test_remove_gives_the_base_back_as_it_was() -> None:
    base = ZOO["bert"].build()
    base.classifier.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    state = {name: (t.data_ptr(), t.clone()) for name, t in base.state_dict().items()}
    adapted = peftfx.transform(base, LoRA(bias="all"))
    assert not any(p.requires_grad for p in base.parameters())
    assert adapted.remove() is base
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    assert base.state_dict().keys() == state.keys()
    for name, tensor in base.state_dict().items():
        assert tensor.data_ptr() == state[name][0]
        assert torch.equal(tensor, state[name][1])


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

    def test_inside_another_module_it_leaves_the_others_state_alone(self) -> None:
        outer = nn.ModuleDict({"before": nn.Linear(2, 2), "model": adapt("custom", LoRA()), "after": nn.Linear(2, 2)})
        names = set(outer.state_dict())
        assert {"before.weight", "before.bias", "after.weight", "after.bias"} < names
        assert all(n.startswith("model.adapters.") for n in names if n.startswith("model."))

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
        assert torch.equal(got, want) if dtype == torch.bfloat16 else torch.allclose(got, want, atol=1e-10)
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
        with pytest.raises(AttributeError, match=r"get_decoder\(\) of the base would run without the adapters"):
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
            (LoRA(target="attention.quer"), "did you mean 'attention.query'"),
            ([LoRA(), LoRA(target="attention")], "two rules act here.*query.*narrow one"),
            (LoRA(target_modules=["classifier"], modules_to_save=["classifier"]), "every targeted module"),
            (LoRA(modules_to_save=["classifer"]), "no module is named classifer.*did you mean 'classifier'"),
            (peft.LoraConfig(**QUERY_VALUE, layer_replication=[(0, 1)]), "does not support layer_replication"),
            (peft.LoHaConfig(target_modules=["query"]), "LOHA"),
            ("attention.query", "unknown method 'attention'"),
            (7, "not a rule: 7"),
            ([], "there are no rules"),
        ],
        ids=["no match", "no role", "two", "all saved", "no module", "option", "method", "text", "number", "none"],
    )  # fmt: skip
    def test_what_cannot_be_followed_is_an_error(self, bare_bert: AdaptedModel, rules: object, message: str) -> None:
        with pytest.raises(PeftfxError, match=f"(?s){message}"):
            bare_bert.add_adapter("odd", rules)
        assert bare_bert.names() == ()

    def test_an_unknown_option_names_the_nearest(self) -> None:
        with pytest.raises(PeftfxError, match="did you mean 'lora_alpha'"):
            LoRA.from_options({"lora_alfa": 3})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(LoRA):
    """LoRA whose second fold on real values fails."""

    __hash__ = LoRA.__hash__

    def fold(self, site, base, p):  # type: ignore[no-untyped-def]
        if base.weight.device.type != "meta" and "layer.1" in site.path:
            raise RuntimeError("out of memory, say")
        return super().fold(site, base, p)


class TestMerge:
    """Merged weights are the adapter and the base in one, and the base is a model like any other."""

    @pytest.mark.parametrize(
        "name", ["gpt2", "albert", "custom", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "t5", "unet"))]
    )
    def test_the_base_computes_what_the_adapted_model_did(self, name: str) -> None:
        adapted = adapt(name, LoRA(r=3, target="all-linear | conv | embedding"))
        inputs = ZOO[name].inputs(3, 6, model=adapted.base)
        leaf = lambda out: out if isinstance(out, Tensor) else out[0]  # noqa: E731
        want, plain = leaf(adapted(**inputs)), leaf(adapted.base(**inputs))
        identity = id(adapted.base)
        placed = {p.site.path for p in adapted.adapter("default").placements}
        report = adapted.merge()
        base = adapted.remove()
        assert id(base) == identity
        assert set(report.sites) == placed
        assert report.worst[1].max_abs == 0
        assert "the weights are fp32's" in str(report)
        assert adapted.names() == ()
        torch.testing.assert_close(leaf(base(**inputs)), want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(want, plain, atol=1e-2)
        torch.testing.assert_close(leaf(adapted(**inputs)), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["gpt2", "t5"])
    def test_tied_weights_part_and_reload(self, name: str, tmp_path: Path) -> None:
        adapted = adapt(name, LoRA(target="embedding.token"))
        base = adapted.base
        tied = base.get_output_embeddings().weight
        assert tied is base.get_input_embeddings().weight
        head = tied.detach().clone()
        inputs = ZOO[name].inputs(model=base)
        want = adapted(**inputs).logits
        report = adapted.merge()
        adapted.remove()
        assert {name.rpartition(".")[0] for name in report.untied} == set(report.sites)
        assert all(base.get_parameter(name) is not base.get_output_embeddings().weight for name in report.untied)
        assert base.config.tie_word_embeddings is False
        assert torch.equal(base.get_output_embeddings().weight, head)
        torch.testing.assert_close(base(**inputs).logits, want, rtol=0, atol=1e-5)
        base.save_pretrained(tmp_path)
        loaded = type(base).from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, base(**inputs).logits)

    def test_an_untied_model_reloads_equal(self, tmp_path: Path) -> None:
        adapted = adapt("bert", LoRA(bias="all", modules_to_save=["classifier"]))
        inputs = ZOO["bert"].inputs(model=adapted.base)
        want = adapted(**inputs).logits
        adapted.merge()
        base = adapted.remove()
        base.save_pretrained(tmp_path)
        loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, base(**inputs).logits)
        torch.testing.assert_close(base(**inputs).logits, want, rtol=0, atol=1e-5)

    def test_a_half_precision_base_is_merged_in_fp32_and_rounded_once(self) -> None:
        base = ZOO["llama"].build().to(torch.bfloat16)
        adapted = peftfx.transform(base, LoRA(r=4, lora_alpha=6))
        torch.manual_seed(0)
        randomise(adapted)
        place = "model.layers.1.self_attn.q_proj"
        a, b = (adapted.adapter("default").get(f"{place}.lora_{x}") for x in "AB")
        assert a.dtype == b.dtype == torch.float32
        old = base.get_submodule(place).weight.detach().clone()
        report = adapted.merge()
        exact = old.float() + 1.5 * (b @ a).detach()
        want = exact.to(torch.bfloat16)
        assert torch.equal(base.get_submodule(place).weight, want)
        lost = (want.float() - exact).abs().max()
        # the sum in one operation or in two: its own last bit is a ten-thousandth of what rounding takes
        assert report.roundings[place].max_abs == pytest.approx(float(lost), rel=1e-3)
        assert report.roundings[place].max_rel == pytest.approx(float(lost / exact.abs().max()), rel=1e-3)
        assert report.bytes == 2 * sum(base.get_submodule(site).weight.numel() for site in report.sites)
        assert report.adapter_bytes == 4 * 4 * 2 * (32 + 32 + 32 + 16)
        assert f"at {report.worst[0]}" in str(report)
        assert not torch.equal(want, old + (1.5 * (b @ a)).to(torch.bfloat16).detach())

    def test_convolutions_grouped_dilated_and_reflected(self) -> None:
        x = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))
        adapted = peftfx.transform(Convs(), LoRA(r=4, target_modules=CONVS), inputs={"x": x})
        randomise(adapted)
        base, p = adapted.base, adapted.adapter("default")
        old = {n: t.clone() for n, t in base.state_dict().items()}
        want = adapted(x)

        def delta(path: str) -> Tensor:
            a, b = p.get(f"{path}.lora_A"), p.get(f"{path}.lora_B")
            return 2 * torch.einsum("or,rikl->oikl", b[..., 0, 0], a)

        manual = F.conv2d(x, old["grouped.weight"], old["grouped.bias"], padding=1, groups=4)
        low = F.conv2d(x, p.get("grouped.lora_A"), padding=1)
        manual = torch.tanh(manual + 2 * F.conv2d(low, p.get("grouped.lora_B"), groups=4))
        manual = torch.tanh(
            F.conv2d(manual, old["dilated.weight"] + delta("dilated"), old["dilated.bias"], padding="same", dilation=2)
        )
        manual = F.conv2d(
            F.pad(manual, (2, 2, 1, 1), mode="reflect"),
            old["reflected.weight"] + delta("reflected"),
            old["reflected.bias"],
            stride=2,
        )
        torch.testing.assert_close(want, manual, rtol=0, atol=1e-5)
        assert set(adapted.merge().sites) == set(CONVS)
        torch.testing.assert_close(base(x), want, rtol=0, atol=1e-5)
        adapted.add_adapter("next", LoRA(r=4, target_modules=CONVS))
        randomise(adapted)
        want = adapted(x)
        adapted.merge()
        torch.testing.assert_close(base(x), want, rtol=0, atol=1e-5)

    def test_merging_in_training_mode_merges_what_evaluation_computes(self) -> None:
        adapted = adapt("bert", LoRA(lora_dropout=0.5))
        inputs = ZOO["bert"].inputs(model=adapted.base)
        want = adapted(**inputs).logits
        adapted.train()
        adapted(**inputs)
        adapted.merge()
        assert adapted.base.training
        torch.testing.assert_close(adapted.remove().eval()(**inputs).logits, want, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("why", ["late", "nan"])
    def test_a_merge_that_fails_changes_nothing(self, why: str) -> None:
        adapted = adapt("bert", Late() if why == "late" else LoRA())
        if why == "nan":
            next(p for n, p in adapted.adapters.named_parameters() if "layer.1" in n).data[0, 0] = float("nan")
        base = adapted.base
        state = {n: t.clone() for n, t in base.state_dict().items()}
        error, text = (RuntimeError, "out of memory") if why == "late" else (PeftfxError, "not finite.*layer.1")
        with pytest.raises(error, match=text):
            adapted.train().merge()
        assert adapted.active == adapted.names() == ("default",)
        assert all(torch.equal(t, state[n]) for n, t in base.state_dict().items())
        inputs = ZOO["bert"].inputs(model=base)
        assert not torch.equal(adapted(**inputs).logits, adapted(**inputs).logits)  # dropout is on, as before


def peak() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class TestFake:
    """A model under FakeTensorMode is transformed without memory."""

    def check(self, config: hf.LlamaConfig) -> tuple[AdaptedModel, float, int]:
        before, start = peak(), time.perf_counter()
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = hf.LlamaForCausalLM(config)
        adapted = peftfx.transform(model, LoRA(r=8))
        adapted.graph()
        seconds, grown = time.perf_counter() - start, peak() - before
        assert all(isinstance(p, FakeTensor) for p in adapted.parameters())
        assert {p.shape[0] for n, p in adapted.adapters.named_parameters() if n.endswith("lora_A")} == {8}
        assert len(list(adapted.adapters.parameters())) == 4 * config.num_hidden_layers
        return adapted, seconds, grown

    def test_a_small_model_is_the_same_graph_as_a_real_one(self) -> None:
        adapted, _, _ = self.check(ZOO["llama"].make().config)
        real = peftfx.transform(ZOO["llama"].build(), LoRA(r=8))
        assert adapted.graph().text() == real.graph().text()
        assert adapted.merge().sites == real.merge().sites

    @pytest.mark.slow
    def test_seven_billion_parameters_take_seconds_and_no_memory(self) -> None:
        config = hf.LlamaConfig(**{**TOKENS, "vocab_size": 32000})
        adapted, seconds, grown = self.check(config)
        _, total = adapted.get_nb_trainable_parameters()
        print(f"7B: {total:,} parameters, {seconds:.1f} s, {grown / 2**20:.0f} MiB")
        assert total > 6.7e9
        assert grown < 2**30
