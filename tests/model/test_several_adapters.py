"""Several adapters on one base: they add up, are switched and taken off, and the base is as it was."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import QUERY_VALUE, randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.bases.guests import own_parameters
from peftfx.errors import PeftfxError
from peftfx.methods.lora import LoRA
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare


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
        with pytest.raises(PeftfxError, match="cannot be an attribute of torch modules: 'train'"):
            adapted.add_adapter("train", LoRA())
        with pytest.raises(PeftfxError, match="is named twice"):
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
        assert not any(p.requires_grad for _, p in own_parameters(base))
        adapted.remove()
        assert all(p.requires_grad for p in base.parameters())


def test_remove_gives_the_base_back_as_it_was() -> None:
    base = ZOO["bert"].build()
    base.classifier.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    state = {name: (t.data_ptr(), t.clone()) for name, t in base.state_dict().items()}
    adapted = peftfx.transform(base, LoRA(bias="all"))
    assert not any(p.requires_grad for _, p in own_parameters(base))
    assert adapted.remove() is base
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    assert base.state_dict().keys() == state.keys()
    for name, tensor in base.state_dict().items():
        assert tensor.data_ptr() == state[name][0]
        assert torch.equal(tensor, state[name][1])


def test_what_a_lost_model_froze_is_trained_again_after_the_next_one() -> None:
    base = ZOO["bert"].build()
    base.classifier.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    peftfx.transform(base, LoRA())
    gc.collect()
    assert not any(p.requires_grad for _, p in own_parameters(base))
    peftfx.transform(base, LoRA()).remove()
    assert {name: p.requires_grad for name, p in own_parameters(base)} == flags


def test_a_call_that_fails_leaves_no_adapter_acting() -> None:
    adapted = peftfx.transform(ZOO["bert"].build(), LoRA(r=2, init_lora_weights=False)).eval()
    base, inputs = adapted.get_base_model(), ZOO["bert"].inputs(model=adapted.base)
    rows = ["default"] * (len(inputs["input_ids"]) - 1) + ["__base__"]
    with torch.no_grad():
        alone, want = base(**inputs).logits, adapted(**inputs).logits
        for more in ({}, {"adapter_names": rows}):
            with pytest.raises(ZeroDivisionError), failing(base.classifier):
                adapted(**inputs, **more)
            assert torch.equal(base(**inputs).logits, alone)
            assert torch.equal(adapted(**inputs).logits, want)
    assert not torch.equal(alone, want)


@contextlib.contextmanager
def failing(module: nn.Module) -> Iterator[None]:
    """Let a module's calls fail."""
    hook = module.register_forward_pre_hook(lambda *given: 1 / 0)
    try:
        yield
    finally:
        hook.remove()
