"""Loops over tokens are captured as one operator: equal to the model's own code at every length, one token included."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.few import but_for
from support.zoo import TOKENS
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel
from peftfx.graph.capturing.loops import recurrences as kernels
from peftfx.graph.capturing.loops.recurrence_operator import recurrence
from peftfx.graph.capturing.loops.recurrences import (
    _channel_scan,
    _chunk_scan,
    _delta_rule,
    _selective_scan,
    recurrences,
)
from peftfx.views.capture import capture
from peftfx.views.finding.decode_view import decode_view

pytestmark = pytest.mark.usefixtures("capture_each")

_SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "recurrent_gemma": {
        **_HEADS,
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 8,
    },
    "qwen3_next": {**_HEADS, **_EXPERTS, **_LINEAR, **_KINDS, "shared_expert_intermediate_size": 24},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def own(model: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


@pytest.mark.parametrize("tokens", [1, 5, 64, 70])
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize(
    ("function", "heads", "per_key"),
    [
        (("qwen3_next", "torch_chunk_gated_delta_rule"), 2, False),
        (("olmo_hybrid", "torch_chunk_gated_delta_rule"), 4, False),
        (("kimi_linear", "chunk_kimi_delta_attention"), 4, True),
    ],
    ids=["heads in groups", "a decay a head", "a decay a key"],
)
def test_a_delta_rule_is_the_one_in_chunks(
    function: tuple[str, str], heads: int, per_key: bool, normed: bool, tokens: int
) -> None:
    shape = (2, tokens)
    given = {
        "query": draw(*shape, heads, 8) / 3,
        "key": draw(*shape, heads, 8, seed=1) / 3,
        "value": draw(*shape, 4, 6),
        "g": -draw(*shape, 4, *([8] if per_key else [])).abs(),
        "beta": draw(*shape, 4, seed=2).sigmoid(),
        "initial_state": draw(2, 4, 8, 6),
        "use_qk_l2norm_in_kernel": normed,
        "output_final_state": True,
    }
    for got, want in zip(_delta_rule(**given), own(*function)(**given), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_a_selective_scan_is_the_one_in_a_loop(gated: bool) -> None:
    given: dict[str, Any] = {"hidden_states": draw(2, 5, 7), "dt": draw(2, 5, 7, seed=1), "A": -draw(5, 3).abs()}
    given |= {"B": draw(2, 3, 7), "C": draw(2, 3, 7, seed=1), "delta_softplus": gated, "return_last_state": True}
    given |= {"D": draw(5), "z": draw(2, 5, 7, seed=2), "delta_bias": draw(5, seed=1)} if gated else {}
    if not gated:
        given["dt"] = given["dt"].abs()
    for got, want in zip(_selective_scan(**given), own("jamba", "mamba_selective_scan")(**given), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "behind"), [(1, True), (1, False), (5, True)])
def test_a_scan_in_chunks_has_no_limits_for_one_token_that_goes_on(tokens: int, behind: bool) -> None:
    """The model's code has one kernel for a single token behind others, without limits for dt, and one for all else."""
    state = draw(2, 4, 6, 3) if behind else torch.zeros(2, 4, 6, 3)
    x, dt, decay = draw(2, tokens, 4, 6), draw(2, tokens, 4) - 2, -draw(4).abs()
    key, query = draw(2, tokens, 2, 3), draw(2, tokens, 2, 3, seed=1)
    given: dict[str, Any] = {"dt_bias": draw(4, seed=1), "dt_softplus": True, "D": draw(4, seed=2)}
    limits = {"dt_limit": (0.5, math.inf), "initial_states": state, "chunk_size": 4, "return_final_states": True}
    kernel = own("nemotron_h", "mamba2_chunk_scan")
    got, left = _chunk_scan(kernel, x, dt, decay, key, query, **given, **limits)  # type: ignore[misc]
    if tokens > 1 or not behind:
        want, kept = kernel(x, dt, decay, key, query, **given, **limits)
    else:
        wide = {name: value[:, None].expand(4, 6) for name, value in given.items() if isinstance(value, Tensor)}
        kept = state.clone()
        one = (x[:, 0], dt[:, 0, :, None].expand(2, 4, 6), decay[:, None, None].expand(4, 6, 3), key[:, 0], query[:, 0])
        want = own("nemotron_h", "mamba2_selective_state_update")(kept, *one, dt_softplus=True, **wide)[:, None]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left, kept, atol=1e-5, rtol=1e-5)


def test_scans_of_single_heads_go_on_from_the_states_of_their_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zamba's code reads the states of all heads from its cache, and then scans the heads one after the other."""
    monkeypatch.setattr(kernels._READ, "listening", True)
    states, decay = draw(2, 3, 5, 4), -draw(5, 4).abs()  # of two rows and three heads
    kernels.note_state(states)
    for head in range(3):
        x, dt, key, query = (draw(2, n, 1, seed=head + i) for i, n in enumerate((5, 5, 4, 4)))
        got, left = _selective_scan(x, dt.abs(), decay, key, query, return_last_state=True)
        kept = states[:, head].clone()
        one = (x[..., 0], dt[..., 0].abs(), decay, key[..., 0], query[..., 0])
        want = own("zamba", "mamba_selective_state_update")(kept, *one)
        torch.testing.assert_close(got[..., 0], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(left, kept, atol=1e-5, rtol=1e-5)
    assert kernels._READ.state is None


def test_a_state_that_code_reads_and_does_not_pass_on_is_gone_on_from() -> None:
    """Mamba's code goes on from its state with one token, and from nothing with several; its mask is of these alone."""
    model = build("mamba")
    view = decode_view(model)
    assert view.new_mask
    graph = capture(model, view.inputs(model), axes=view.axes, call=view)
    for sizes in ({"batch": 2, "sequence": 4, "past": 0}, {"batch": 3, "sequence": 1, "past": 5}, {"sequence": 3}):
        case = view.inputs(model, sizes=sizes, seed=1)
        with torch.no_grad():
            got, want = graph(**case), view(model, case)
        for name in view.present_names:
            torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5)
        shown = [view.shown("logits", case, found["logits"]) for found in (got, want)]
        torch.testing.assert_close(*shown, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("behind", [True, False], ids=["behind a text", "first"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_scan_of_channels_is_the_one_in_a_loop(tokens: int, behind: bool) -> None:
    unit = own("recurrent_gemma", "RecurrentGemmaRglru")
    given = {
        "hidden_states": draw(2, tokens, 8),
        "recurrent_gate": draw(2, tokens, 8, seed=1).sigmoid(),
        "reset": torch.arange(tokens).expand(2, -1)[..., None] == 2,
        "recurrent_states": draw(2, 8) if behind else None,
    }
    for got, want in zip(_channel_scan(nn.Module(), **given), unit._rnn_scan(None, **given), strict=True):
        torch.testing.assert_close(got, want)


def test_a_dry_run_takes_one_operator_for_a_loop_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("qwen3_next"), []

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return _delta_rule(*args, **options)

    monkeypatch.setattr(kernels, "_KERNELS", {"chunk_gated_delta_rule": spy})
    names = [kept.name for kept in decode_view(model).layers[0].kept]
    assert names == ["conv_state", "recurrent_state"]
    assert len(calls) == 1


def test_its_gradients_are_those_of_its_steps() -> None:
    shapes = (1, 3, 2, 4), (1, 3, 2, 4), (1, 3, 2, 3), (1, 3, 2, 4), (1, 3, 2), (1, 2, 4, 3)
    given = [draw(*shape).double().requires_grad_() for shape in shapes]
    for corrected in (True, False):
        assert torch.autograd.gradcheck(lambda *tensors, c=corrected: recurrence(*tensors, c), given)


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(name, **_SIZES, **MODELS[name]))
    return model.eval()


def test_the_models_code_is_its_own_again() -> None:
    model = build("mamba")
    namespace = vars(importlib.import_module(type(model).__module__))
    before = dict(namespace)
    with recurrences(model):
        assert namespace["mamba_selective_scan"] is _selective_scan
    assert namespace == before
    unit = own("recurrent_gemma", "RecurrentGemmaRglru")
    scan = unit._rnn_scan
    with recurrences(build("recurrent_gemma")):
        assert unit._rnn_scan is _channel_scan
    assert unit._rnn_scan is scan


@pytest.mark.slow
def test_a_delta_rule_has_the_roles_of_an_attention_in_train_mode_too() -> None:
    rule = peftfx.LoRA(r=2, target="attention.query | attention.value", init_lora_weights=False)
    model, ids = build("qwen3_next"), torch.randint(4, 99, (2, 6), generator=torch.Generator().manual_seed(0))
    adapted = peftfx.transform(model.train(), rule, seed=0, road="graph")
    site = adapted.sites.by_path("model.layers.0.linear_attn.in_proj_qkvz")
    assert site.role == "attention.qkv"
    assert {part.role: part.rows for part in site.parts} == {
        "attention.query": ((0, 8), (48, 56)),
        "attention.key": ((8, 16), (56, 64)),
        "attention.value": ((16, 32), (64, 80)),
    }
    assert adapted.sites.by_path("model.layers.0.linear_attn.out_proj").role == "attention.output"
    with torch.no_grad():
        trained, plain = (m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (adapted, model))
        assert float((trained - plain).abs().max()) > 1e-2
        torch.testing.assert_close(
            trained, adapted.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, atol=1e-4, rtol=1e-4
        )


def test_a_state_space_has_no_roles_of_an_attention() -> None:
    assert not [site for site in capture(build("mamba")).sites if site.role.startswith("attention")]


@pytest.mark.parametrize("name", but_for({"qwen3_next"}, MODELS))
def test_an_export_takes_every_length(name: str, tmp_path: Path) -> None:
    adapted = peftfx.transform(
        build(name), peftfx.LoRA(r=2, target_modules=["x_proj", "in_proj_qkvz", "linear_x"]), seed=0
    )
    randomise(adapted.adapters)
    adapted.export(tmp_path / "out", view="forward")
    model = OnnxModel(tmp_path / "out")
    for batch, tokens in ((1, 1), (2, 3), (1, 70)):
        ids = torch.randint(4, 99, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            want = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        got = model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
