"""Training trains the adapter alone, with the dropout, loss and gradients of `peft`."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import QUERY_VALUE, adapt, both, gradients, our_name, randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.methods.lora import LoRA
from peftfx.model.adapted import AdaptedModel

DROPPED = [{"use_dora": True}, {"modules_to_save": ["classifier"], "bias": "all"}, {"bias": "lora_only"}]
COUNTED = [{}, {"r": 16, "use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["classifier"]}]


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
        torch.testing.assert_close(adapted(**inputs), quiet, rtol=0, atol=1e-6)  # training has products of its own

    @pytest.mark.parametrize("road", ["modules", "graph"])
    @pytest.mark.parametrize("training", [False, True])
    def test_a_new_and_a_loaded_adapter_keep_the_mode_of_the_base(
        self, training: bool, road: str, tmp_path: Path
    ) -> None:
        made = peftfx.transform(ZOO["bert"].build().train(training), LoRA(lora_dropout=0.5), road=road)
        randomise(made)
        made.save_pretrained(tmp_path)
        loaded = peftfx.load(ZOO["bert"].build().train(training), tmp_path, road=road)
        inputs = ZOO["bert"].inputs(model=made.base)
        for model in (made, loaded):
            assert model.training is training
            assert torch.equal(model(**inputs).logits, model(**inputs).logits) is not training

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

    def test_a_model_without_gradient_checkpointing_is_refused_it(self) -> None:
        with pytest.raises(PeftfxError, match="no gradient checkpointing of its own"):
            adapt("custom", LoRA()).gradient_checkpointing_enable()


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


class InPlace(nn.Module):
    """Layers whose outputs the model's code changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu_().mean((2, 3))).mul_(2)


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_a_module_that_is_dropped_gets_no_gradient_as_in_peft(config: type[peft.LoHaConfig], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = InPlace(), torch.randn(5, 3, 6, 4)
    options = config(r=2, target_modules=["conv", "linear"], module_dropout=0.5, rank_dropout=0.2)
    theirs = peft.get_peft_model(copy.deepcopy(base), options)
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = peftfx.load(base, tmp_path, inputs={"x": x})
    assert ours.road == "modules"
    without: list[list[str]] = [[], []]
    for found, model in zip(without, (ours, theirs), strict=True):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        torch.manual_seed(5)
        for size in (5, 1, 4, 2, 3, 5, 5, 5, 1, 3, 5, 5):
            loss = model(x[:size]).square().mean()
            if loss.requires_grad:  # in `peft` it has no gradient if both modules are dropped
                loss.backward()
            found += [str([our_name(n) for n, p in model.named_parameters() if p.requires_grad and p.grad is None])]
            optimizer.step()
            optimizer.zero_grad()
    assert [text.count("conv") for text in without[0]] == [text.count("conv") for text in without[1]]
    assert len(set(without[0])) == 4
    (ours.eval(), theirs.eval())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_on_the_graph_road_a_module_that_is_dropped_gets_zeros() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 6, 4)
    rule = peftfx.LoKr(r=2, target_modules=["conv", "linear"], module_dropout=0.99)
    model = peftfx.transform(InPlace(), rule, inputs={"x": x}, road="graph").train()
    model(x[:1]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.adapters.parameters())
