"""LoRAs on parameters in the base's own modules: each reading of the parameter gives the sum, as in HF PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise, trained
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError

SIZE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZE, num_local_experts=3, num_key_value_heads=1, **options))


def gpt_oss(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZE, "head_dim": 8, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **options))


def looped() -> nn.Module:
    return mixtral(experts_implementation="eager")


def llama4() -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZE, "head_dim": 8, "num_key_value_heads": 1, "num_local_experts": 3, "intermediate_size_mlp": 24}
    config = hf.Llama4TextConfig(**sizes, pad_token_id=0, num_experts_per_tok=1, interleave_moe_layer_step=1)
    return hf.Llama4ForCausalLM(config)


BASES = [
    pytest.param(mixtral, [*STACKS, "gate.weight"], id="mixtral"),
    pytest.param(gpt_oss, [*STACKS, "router.weight"], id="gpt_oss"),
    pytest.param(looped, STACKS, id="looped"),
    pytest.param(llama4, STACKS, id="llama4"),
]


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[nn.Module, peftfx.AdaptedModel]]:
    """`peft`'s model with a random LoRA, and ours with the same."""

    def made(base: Callable[[], nn.Module], names: list[str], road: str | None = "modules") -> Any:
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=names)
        theirs = peft.get_peft_model(base(), config)
        randomise(theirs)
        theirs.save_pretrained(str(tmp_path))
        return theirs, peftfx.load(base(), tmp_path, road=road)

    return made


def steps(model: nn.Module, *, autocast: bool = False) -> list[float]:
    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return model(input_ids=IDS, labels=IDS).loss

    return trained(model.train(), loss)


def gradients(model: nn.Module) -> Mapping[str, Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("base", "names"), BASES)
def test_steps_are_those_of_peft(base: Any, names: list[str], pair: Any) -> None:
    theirs, ours = pair(base, names)
    assert ours.road == "modules"
    assert steps(ours) == pytest.approx(steps(theirs), abs=2e-6)
    saved, own = peft.get_peft_model_state_dict(theirs), peftfx.get_peft_model_state_dict(ours)
    assert all(torch.allclose(own[name], tensor, atol=1e-4) for name, tensor in saved.items())


@pytest.mark.parametrize("base", [mixtral, gpt_oss])
def test_under_autocast_the_steps_are_those_of_peft(base: Any, pair: Any) -> None:
    theirs, ours = pair(base, STACKS)
    assert steps(ours, autocast=True) == pytest.approx(steps(theirs, autocast=True), abs=1e-6)


@pytest.mark.parametrize(("base", "names"), BASES)
def test_both_roads_have_the_same_gradients(base: Any, names: list[str], pair: Any) -> None:
    (_, modules), (_, graph) = pair(base, names), pair(base, names, None)
    assert (modules.road, graph.road) == ("modules", "graph")
    want, got = gradients(graph), gradients(modules)
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_parts_of_a_stack_are_adapted_by_themselves() -> None:
    rules = [peftfx.LoRA(r=2, target=role, init_lora_weights=False) for role in ("experts.gate", "experts.down")]
    modules, graph = (peftfx.transform(mixtral(), rules, road=road, seed=1) for road in ("modules", None))
    want, got = gradients(graph), gradients(modules)
    assert len(want) == len(got) == 8
    assert all(torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-6) for name, gradient in want.items())


def _reads(self: nn.Module, *args: object, **kwargs: Any) -> object:
    """A forward as TRL sets it: the backbone by itself, and the head's weight."""
    hidden = self.model(kwargs["input_ids"]).last_hidden_state
    logits = hidden @ self.get_output_embeddings().weight.T
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), kwargs["labels"][:, 1:].flatten())
    return hf.modeling_outputs.CausalLMOutput(loss=loss)


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.further)], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("base", "names"), BASES)
def test_a_forward_that_is_set_on_the_model_has_the_adapter(base: Any, names: Any, kept: bool, pair: Any) -> None:
    theirs, ours = pair(base, names, None)
    inner = theirs.get_base_model()
    for model, forwards in ((theirs, inner), (ours, ours)):
        if kept:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        forwards.forward = MethodType(_reads, forwards)
    assert steps(ours) == pytest.approx(steps(theirs), abs=2e-6)
    assert ours.base.is_gradient_checkpointing == kept


def test_a_graph_that_is_captured_inside_such_a_forward_is_of_the_base(pair: Any) -> None:
    theirs, ours = pair(mixtral, STACKS, None)
    own = ours.forward
    ours.forward = MethodType(lambda self, *args, **kwargs: own(*args, **kwargs), ours)
    assert steps(ours) == pytest.approx(steps(theirs), abs=2e-6)
    assert ours.road == "graph"


def test_a_call_without_a_graph_tells_of_the_other_road(pair: Any) -> None:
    def noisy(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * 2 if output.sum() > 0 else output  # no graph has a branch on values

    theirs, ours = pair(mixtral, STACKS, None)
    ours.base.get_input_embeddings().register_forward_hook(noisy)
    with pytest.raises(PeftfxError, match=r'peftfx\.transform\(\.\.\., road="modules"\)'):
        ours(input_ids=IDS)
    _, ours = pair(mixtral, STACKS)
    for model in (theirs, ours):
        model.get_input_embeddings().register_forward_hook(noisy)
    assert steps(ours) == pytest.approx(steps(theirs), abs=2e-6)


def test_adapters_come_and_go(pair: Any) -> None:
    _, ours = pair(mixtral, STACKS)
    ours.eval()
    alone = ours(input_ids=IDS).logits
    rule = peftfx.LoRA(r=3, target_parameters=STACKS, init_lora_weights=False)
    ours.add_adapter("second", rule, seed=2)
    ours.set_adapter(["default", "second"])
    both = ours(input_ids=IDS).logits
    copied = copy.deepcopy(ours)
    assert torch.equal(copied(input_ids=IDS).logits, both)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(input_ids=IDS).logits, mixtral().eval()(input_ids=IDS).logits)
    merged = copied.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, both, rtol=1e-4, atol=1e-5)
    ours.delete_adapter("second")
    assert torch.equal(ours(input_ids=IDS).logits, alone)
    plain = ours.unload()
    assert type(plain.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert isinstance(plain.model.layers[0].mlp.experts.down_proj, nn.Parameter)
    assert torch.equal(plain(input_ids=IDS).logits, mixtral().eval()(input_ids=IDS).logits)


def test_a_loop_over_experts_folds_once(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair(looped, STACKS)
    seen: list[int] = []
    own = peftfx.LoRA.fold
    monkeypatch.setattr(peftfx.LoRA, "fold", lambda *args: (seen.append(1), own(*args))[1])
    ours(input_ids=IDS)
    assert len(seen) == 2 * len(STACKS)  # two layers


def test_a_parameter_that_another_module_reads_is_left_to_a_graph() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = nn.Module()
            self.held.stack = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.held.stack)

    rule, inputs = peftfx.LoRA(r=2, target_parameters=["held.stack"]), {"x": torch.randn(2, 3, 4)}
    assert peftfx.transform(Held(), rule, inputs=inputs).road == "graph"
    with pytest.raises(PeftfxError, match="no module of the base can run this adapter"):
        peftfx.transform(Held(), rule, inputs=inputs, road="modules")
