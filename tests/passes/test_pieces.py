"""A graph that is checkpointed, cut where layers end: it has the loss and gradients of the whole, and keeps less."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from support.adapted import adapt, gradients
from support.few import but_for
from support.zoo import ZOO
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import peftfx
from peftfx import PeftfxError
from peftfx.model.adapted import AdaptedModel

pytestmark = pytest.mark.further

RULE = peftfx.LoRA(target="all-linear", lora_dropout=0.1)
SIZE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
FEW = ("bert", "t5", "deberta", "gpt2", "vit", "whisper", "opt", "gemma2", "clip", "unet", "swin", "blip2")


@pytest.fixture(scope="module")
def deep() -> AdaptedModel:
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=64, num_hidden_layers=6, attention_dropout=0.1, **SIZE)
    model = peftfx.transform(hf.LlamaForCausalLM(config), RULE, road="graph", seed=0).train()
    model(**batch())
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model gives and its gradients, from one seed."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**inputs)
    loss = output["loss"] if isinstance(output, dict) and "loss" in output else sum(_means(output))
    loss.backward()
    return {"loss": loss.detach(), **{name: g.clone() for name, g in gradients(model).items()}}


def _means(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output.square().mean()
        return
    for value in output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ():
        yield from _means(value)


def kept(model: nn.Module) -> int:
    """The bytes that a call keeps for its backward, beside parameters."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    model(**batch())
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch())
    assert output.loss.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize(
    "options", [{}, {"use_reentrant": True}, {"use_reentrant": False, "preserve_rng_state": True}], ids=str
)
def test_a_step_is_the_same_to_the_bit_and_keeps_less(deep: AdaptedModel, options: dict[str, bool]) -> None:
    want, whole = step(deep, batch()), kept(deep)
    deep.gradient_checkpointing_enable(options)
    got, size = step(deep, batch()), kept(deep)
    deep.gradient_checkpointing_disable()
    assert len(want) > 84
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert size < whole / (4 if options.get("use_reentrant") else 6)  # reentrant, the first layer is kept


def test_every_other_layer_keeps_about_half(deep: AdaptedModel) -> None:
    sizes = [kept(deep)]
    for every in (6, 2, 1):
        deep.gradient_checkpointing_enable(every_n_layers=every)
        sizes.append(kept(deep))
    deep.gradient_checkpointing_disable()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / 3 < sizes[2] < 2 * sizes[0] / 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every_n_layers": 0}, "not a number of layers"),
        ({"offload": True}, "cannot be checkpointed with offload"),
        ({"gradient_checkpointing_kwargs": {"reentrant": True}}, "with reentrant"),
    ],
)
def test_what_a_graph_cannot_do_is_refused(deep: AdaptedModel, given: dict[str, object], message: str) -> None:
    with pytest.raises(PeftfxError, match=message):
        deep.gradient_checkpointing_enable(**given)  # type: ignore[arg-type]
    assert deep.checkpoints is None


def test_a_base_that_is_checkpointed_itself_is_so_as_a_graph(deep: AdaptedModel) -> None:
    want, whole = step(deep, batch()), kept(deep)
    deep.base.activation_checkpointing_enable()  # type: ignore[operator]
    got, size = step(deep, batch()), kept(deep)
    deep.base.activation_checkpointing_disable()  # type: ignore[operator]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert size < whole / 6


def test_running_means_are_counted_once_and_what_is_written_into_is_not_cut() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.norm(self.up(x)).relu())

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros_like(x)
            for layer in self.layers:
                x = layer(x)
                total.add_(x)
            return total

    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 8)}
    rule = peftfx.LoRA(target="mlp.up | mlp.down")
    model = peftfx.transform(Layers(), rule, inputs=inputs, road="graph", seed=0).train()
    model(**inputs)
    means = operator.attrgetter("base.layers.0.norm.running_mean")
    before, found = means(model).clone(), []
    for on in (False, True):
        means(model).copy_(before)
        if on:
            model.gradient_checkpointing_enable()
        found.append({**step(model, inputs), "mean": means(model).clone()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert not torch.equal(found[0]["mean"], before)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"prefix_projection": True, "encoder_hidden_size": 8}], ids=["", "projected"])
def test_a_prefix_trains_through_a_graph_in_pieces_and_is_refused_in_modules(options: dict[str, object]) -> None:
    rule = peftfx.PrefixTuning(num_virtual_tokens=3, **options)  # type: ignore[arg-type]
    model = adapt("llama", rule, road="graph").train()
    inputs = ZOO["llama"].inputs(model=model.base, labels=True)
    want = step(model, inputs)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = step(model, inputs)
        model.gradient_checkpointing_disable()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], value) for name, value in want.items())
    model = adapt("llama", rule).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(PeftfxError, match="prefix does not work with gradient checkpointing"):
        model(**inputs)


@pytest.mark.parametrize("name", but_for({*FEW} - {"t5", "deberta", "vit", "clip"}, FEW))
def test_models_of_other_kinds_are_cut(name: str) -> None:
    model = adapt(name, peftfx.LoRA(target="all-linear", lora_dropout=0.1), road="graph").train()
    inputs = ZOO[name].inputs(model=model.base)
    want = step(model, inputs)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(step(model, inputs), want, rtol=1e-6, atol=1e-7)
    assert any(len(pieces.pieces) > 1 for _, pieces in model.graphs.runs._pieces.values())
