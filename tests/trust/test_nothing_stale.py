"""Nothing stale: a capture leaves the model as it was, and a graph is used while what it was made from is the same."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as hf
from support.zoo import ZOO
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import peftfx
from peftfx.errors import PeftfxError
from peftfx.model.adapted import AdaptedModel
from peftfx.views import prefix
from peftfx.views.capture import capture


class Remembers(nn.Module):
    """A layer that keeps what it computes for the next call: in an attribute, a dict, a list, a buffer, an object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.made, self.kept = nn.Linear(4, 4), {}, []
        self.notes = Notes()
        self.register_buffer("table", torch.ones(4))
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.table
        self.last = self.made["y"] = self.notes.y = y
        self.kept.append(y)
        self.register_buffer("table", torch.ones(4, device=x.device))
        self.new = y
        return y


class Notes:
    """An object that is no module."""

    y: object = None


def lora(model: nn.Module, target: str = "linear | head", **inputs: Tensor) -> AdaptedModel:
    return peftfx.transform(model, peftfx.LoRA(r=2, target=target), inputs=inputs or None, seed=0, road="graph")


def test_capture_leaves_every_attribute_as_it_was() -> None:
    model = Remembers()
    table = model.table
    adapted = lora(model, x=torch.zeros(2, 3, 4))
    adapted.eval()(torch.zeros(2, 3, 4))
    assert (model.last, model.made, model.kept, vars(model.notes)) == (None, {}, [], {})
    assert model.table is table
    assert not hasattr(model, "new")


def test_phi_3_with_long_rope_computes_the_same_after_a_capture_and_trains() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = hf.Phi3Config(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        pad_token_id=1,
        rope_parameters=rope,
    )
    model = hf.Phi3ForCausalLM(config).eval()
    ids = torch.randint(4, 99, (2, 20))  # longer than the first of its two ranges
    want = copy.deepcopy(model)(input_ids=ids).logits
    adapted = lora(model, "attention.query")
    assert not any(isinstance(value, FakeTensor) for module in model.modules() for value in vars(module).values())
    torch.testing.assert_close(adapted(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(input_ids=ids).logits, want, atol=0, rtol=0)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.adapters.parameters())


class Reads(nn.Module):
    """Code that reads attributes, a config, dropout's rate, a norm's eps, a hook's word and an argument's values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.5)
        self.factor, self.factors, self.offset = 2.0, [1.0, 3.0], torch.ones(4)
        self.config = Notes()
        self.config.scale = {"all": 1.0}
        self.eval()

    def forward(self, x: Tensor, shift: object = 0.0) -> Tensor:
        y = self.drop(self.norm(self.layer(x)))
        y = y * self.factor * self.factors[1] * self.config.scale["all"] + self.offset
        return y + (shift if isinstance(shift, float) else torch.as_tensor(shift).sum())


def set_hook(model: Reads) -> None:
    model.layer.register_forward_hook(lambda module, args, output: output.cumsum(-1))


def set_pre_hook(model: Reads) -> None:
    model.norm.register_forward_pre_hook(lambda module, args: (args[0].cumsum(-1),))


def set_eps(model: Reads) -> None:
    model.norm.eps = 10.0


def set_rate(model: Reads) -> None:
    model.drop.train().p = 1.0


def set_part(model: Reads) -> None:
    model.norm = nn.Identity()


def set_in_place(model: Reads) -> None:
    model.factors[1] = 5.0


CHANGES = [
    lambda model: setattr(model, "factor", 7.0),
    lambda model: setattr(model, "offset", torch.full((4,), 5.0)),
    lambda model: model.config.scale.update(all=4.0),
    lambda model: setattr(model.config, "scale", {"all": 4.0}),
    *(set_hook, set_pre_hook, set_eps, set_rate, set_part, set_in_place),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_sees_what_the_models_code_sees_after_a_change(change: Callable[[Reads], object]) -> None:
    model, x = Reads(), torch.randn(2, 3, 4)
    adapted = lora(model, x=x)
    torch.testing.assert_close(adapted(x), model(x))
    before = model(x)
    change(model)
    torch.testing.assert_close(adapted(x), model(x))
    assert (before - model(x)).abs().max() > 0.1


def test_arguments_are_compared_by_value_whatever_they_are() -> None:
    model, x = Reads(), torch.randn(2, 3, 4)
    adapted = lora(model, x=x)
    large = np.zeros(100_000)
    for shift in (large.copy(), large + 1, 1.0, 2.0, np.float32(2.0), large + 1):
        torch.testing.assert_close(adapted(x, shift=shift), model(x, shift=shift))
    large[500] = 3.0  # its `repr` is as before
    torch.testing.assert_close(adapted(x, shift=large), model(x, shift=large))


def test_nothing_is_captured_again_while_all_is_the_same() -> None:
    model, x = Reads(), torch.randn(2, 3, 4)
    adapted = lora(model, x=x)
    adapted(x)
    captured = [*adapted.graphs._captured]
    model.offset = model.offset.clone()  # another object, of equal values
    adapted(x, shift=1.0)
    adapted(x)
    assert len(captured) == 1
    assert len(adapted.graphs._captured) == 2
    assert all(len(states) == 1 for states in adapted.graphs._captured.values())


def test_what_was_trained_is_trained_again_when_the_last_adapter_over_a_base_is_gone() -> None:
    model, x = Reads(), torch.randn(2, 3, 4)
    model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    first, second = lora(model, x=x), lora(model, x=x)
    copied = copy.deepcopy(second)
    first.remove()
    assert not any(p.requires_grad for p in model.parameters())  # the second has an adapter still
    second.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: p.requires_grad for name, p in copied.remove().named_parameters()} == before


def test_a_merge_under_another_adapted_model_is_refused_and_one_without_adapters_sees_it() -> None:
    model, x = Reads(), torch.randn(2, 3, 4)
    first, second = lora(model, x=x), lora(model, x=x)
    with torch.no_grad():
        for p in first.adapters.parameters():
            p.normal_()
    with pytest.raises(PeftfxError, match="under another adapted model"):
        first.merge()
    second.remove()
    second(x)
    want = first(x)
    first.merge()
    torch.testing.assert_close(second(x), want, atol=1e-5, rtol=1e-5)


def test_two_threads_capture_at_once_and_one_disables_adapters_for_itself_alone() -> None:
    x, results = torch.randn(2, 3, 4), dict[int, float]()

    def work(number: int) -> None:
        model = Reads()
        adapted = lora(model, x=x)
        for _ in range(3):
            model.factor += 1.0
            results[number] = float((adapted(x) - model(x)).abs().max())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: 0.0, 1: 0.0}

    adapted, seen = lora(Reads(), x=x), list[tuple[str, ...]]()
    with adapted.disable_adapter():
        other = threading.Thread(target=lambda: seen.append(adapted.active))
        other.start()
        other.join()
        assert adapted.active == ()
    assert seen == [("default",)] == [adapted.active]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_weight_that_its_own_forward_scales_is_refused_and_one_scaled_ahead_is_the_same(kind: type) -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(kind(9, 4, max_norm=1.0), nn.Linear(4, 2)).eval(), torch.randint(9, (2, 5))
    with pytest.raises(PeftfxError, match=r"Embedding\(max_norm=\).*\[0\.weight\]"):
        capture(model, {"input": ids})
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight.copy_(torch.renorm(scaled[0].weight, 2, 0, 1.0))
    scaled[0].max_norm = None
    graph = capture(scaled, {"input": ids})
    torch.testing.assert_close(graph(input=ids), model(ids))


def test_what_a_model_keeps_is_measured_once_and_again_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ZOO["llama"].build().eval()
    adapted = peftfx.transform(model, peftfx.PrefixTuning(num_virtual_tokens=3))
    measured: list[tuple[int, int, int]] = []

    def counting(base: nn.Module, decodes: bool) -> tuple[int, int, int]:
        measured.append(made(base, decodes))
        return measured[-1]

    made = prefix._measured
    monkeypatch.setattr(prefix, "_measured", counting)
    ids = {"input_ids": torch.randint(64, (2, 5))}
    adapted(**ids)
    adapted(**ids)
    assert measured == []
    layers = len(model.model.layers)
    model.model.layers = model.model.layers[:-1]
    assert prefix.cache_shape(model, False)[0] == layers - 1
    assert len(measured) == 1
