"""A capture that copies equal layers is, node by node, the one that traces each; a layer that differs is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import transformers as tr
from support.few import but_for
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import peftfx
from peftfx.graph.capturing import stamping
from peftfx.graph.graph import CONSTANTS, Graph
from peftfx.views import dry_run
from peftfx.views.capture import capture
from peftfx.views.capturing.equal_layers import _Seen
from peftfx.views.finding.named_views import find_view

pytestmark = pytest.mark.usefixtures("capture_each")

TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
TWO_STACKS = {"vocab_size": 99, "d_model": 32, "encoder_layers": 4, "decoder_layers": 4}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_head": 4, "n_layer": 4}
GPT_NEO = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_layers": 6,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 3]],
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**TEXT, num_key_value_heads=2)),
    "gpt2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(**GPT2)),
    "gpt_neo": lambda: tr.GPTNeoForCausalLM(tr.GPTNeoConfig(**GPT_NEO)),
    "gemma2": lambda: tr.Gemma2ForCausalLM(tr.Gemma2Config(**{**GROUPED, "num_hidden_layers": 8})),
    "gemma3": lambda: tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**{**GROUPED, "num_hidden_layers": 12})),
    "qwen3": lambda: tr.Qwen3ForCausalLM(tr.Qwen3Config(**GROUPED)),
    "qwen3_moe": lambda: tr.Qwen3MoeForCausalLM(
        tr.Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "mixtral": lambda: tr.MixtralForCausalLM(tr.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)),
    "bloom": lambda: tr.BloomForCausalLM(tr.BloomConfig(vocab_size=99, hidden_size=32, n_head=4, n_layer=4)),
    "gpt_neox": lambda: tr.GPTNeoXForCausalLM(tr.GPTNeoXConfig(**TEXT)),
    "phi": lambda: tr.PhiForCausalLM(tr.PhiConfig(**TEXT)),
    "olmo2": lambda: tr.Olmo2ForCausalLM(tr.Olmo2Config(**TEXT)),
    "opt": lambda: tr.OPTForCausalLM(
        tr.OPTConfig(
            vocab_size=99,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_attention_heads=4,
            num_hidden_layers=4,
        )
    ),
    "falcon": lambda: tr.FalconForCausalLM(
        tr.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=True)
    ),
    "lfm2": lambda: tr.Lfm2ForCausalLM(
        tr.Lfm2Config(
            **{**TEXT, "num_hidden_layers": 8}, num_key_value_heads=2, layer_types=["conv"] * 5 + ["full_attention"] * 3
        )
    ),
    "bert": lambda: tr.BertForSequenceClassification(tr.BertConfig(**TEXT)),
    "albert": lambda: tr.AlbertForSequenceClassification(tr.AlbertConfig(**TEXT, embedding_size=16)),
    "vit": lambda: tr.ViTForImageClassification(
        tr.ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4)
    ),
    "swin": lambda: tr.SwinForImageClassification(
        tr.SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[2, 4], num_heads=[2, 4], window_size=4)
    ),
    "convnext": lambda: tr.ConvNextForImageClassification(
        tr.ConvNextConfig(hidden_sizes=[8, 16], depths=[3, 4], num_stages=2, image_size=16)
    ),
    "t5": lambda: tr.T5ForConditionalGeneration(
        tr.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=5, num_heads=4)
    ),
    "bart": lambda: tr.BartForConditionalGeneration(tr.BartConfig(**TWO_STACKS, encoder_ffn_dim=48)),
    "whisper": lambda: tr.WhisperForConditionalGeneration(
        tr.WhisperConfig(
            **TWO_STACKS,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=50,
            num_mel_bins=8,
            pad_token_id=0,
        )
    ),
}
SHORT = ("llama decode", "gpt2 forward", "gpt_neo decode")
COPIED = (*SHORT, "t5 decoder", "bart decoder", "whisper decoder")
CAUSAL = (*list(MODELS)[:15],)
VIEWS = [
    *(f"{name} forward" for name in MODELS),
    *(f"{name} decode" for name in CAUSAL),
    *(f"{name} train" for name in ("llama", "gpt2", "bert")),
    *("t5 encoder", "t5 decoder", "bart decoder", "whisper decoder"),
]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The layers that were copied, by path."""
    found: list[str] = []
    copied = stamping.copied_layer

    def seen(tracer: object, traced: object, call: object, path: str) -> object:
        found.append(path)
        return copied(tracer, traced, call, path)  # type: ignore[arg-type]

    monkeypatch.setattr(stamping, "copied_layer", seen)
    return found


def text(graph: Graph) -> list[object]:
    """All that a graph is, but for the names of its nodes; copies of a layer share a constant that its code makes."""
    constants = {n for n in graph.module.graph.nodes if n.op == "get_attr" and str(n.target).startswith(CONSTANTS)}
    nodes = [node for node in graph.module.graph.nodes if node not in constants]
    places: dict[fx.Node, object] = {node: i for i, node in enumerate(nodes)}
    places |= {node: graph.get(str(node.target)).tolist() for node in constants}

    def shape(value: object) -> object:
        return (str(value.shape), str(value.stride()), value.dtype) if isinstance(value, Tensor) else str(value)

    return [
        (
            node.op,
            str(node.target),
            repr(pytree.tree_map_only(fx.Node, places.__getitem__, (node.args, node.kwargs))),
            repr(pytree.tree_map(shape, node.meta.get("val"))),
            [(str(key), *map(str, entry)) for key, entry in (node.meta.get("nn_module_stack") or {}).items()],
        )
        for node in nodes
    ]


def captured(model: nn.Module, name: str, stamp: bool) -> Graph:
    view = find_view(model, "forward" if name == "train" else name)
    if view is None:
        return capture(model, stamp=stamp)
    return capture(model, view.inputs(model), axes=view.axes, call=view, stamp=stamp)


@pytest.mark.parametrize("case", but_for({*VIEWS} - {*SHORT[:2]}, VIEWS))
def test_a_graph_is_that_of_a_whole_capture(case: str, copies: list[str]) -> None:
    name, view = case.split()
    torch.manual_seed(0)
    model = MODELS[name]().train(view == "train")
    one, whole = captured(model, view, True), captured(model, view, False)
    assert text(one) == text(whole)
    assert one.conditions == whole.conditions
    assert [(s.path, s.role) for s in one.sites] == [(s.path, s.role) for s in whole.sites]
    if case in COPIED:
        assert copies


def test_layers_with_two_caches_are_copied(copies: list[str]) -> None:
    """Their code looks up in the cache, by the layer's number, whether the cross-attention is filled."""
    captured(MODELS["bart"]().eval(), "decoder", True)
    assert {path.rpartition("decoder.layers.")[2] for path in copies} == {"2", "3"}


class Config:
    def __init__(self) -> None:
        self.layer_types = ["same"] * 6

    def to_dict(self) -> dict[str, object]:
        return vars(self)


class Layer(nn.Module):
    """A layer that knows its number, and one way in which it is another than the rest."""

    __static_attributes__ = ("layer_idx", "linear", "scale", "seen", "way")  # as Python notes from 3.13 on

    def __init__(self, index: int, way: str, config: Config) -> None:
        super().__init__()
        self.way, self.layer_idx, self.config, self.seen = way, index, config, 0
        self.linear = nn.Linear(4, 4)
        self.scale = float(index) if way == "attribute" else 1.0
        if way == "buffer" and index == 3:
            self.linear.bias = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.scale
        if self.way == "compares" and self.layer_idx >= 3:
            y = y + 1
        if self.way == "computes":
            y = y / (self.layer_idx + 1)
        if self.way == "config" and self.config.layer_types[self.layer_idx] == "other":
            y = y.tanh()
        if self.way == "writes":
            self.seen = self.seen + 1
        return y + x


class Stack(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        config = Config()
        if way == "config":
            config.layer_types[3] = "other"
        self.layers = nn.ModuleList(Layer(i, way, config) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x) if self.way == "forward" else layer(x)
        return x.mul_(2) if self.way == "in place" else x


@pytest.mark.parametrize(
    ("way", "count"),
    [
        ("none", 3),
        ("in place", 3),
        ("attribute", 0),
        ("buffer", 2),
        ("compares", 0),
        ("computes", 0),
        ("config", 2),
        ("writes", 0),
        ("forward", 0),
    ],
)
def test_what_differs_is_traced(way: str, count: int, copies: list[str]) -> None:
    """The first layer's input needs no gradient, and two of the rest are traced."""
    before = Layer.forward
    torch.manual_seed(0)
    model = Stack(way)
    x = torch.randn(3, 4)
    graph = peftfx.capture(model, {"x": x})
    assert len(copies) == count
    assert text(graph) == text(capture(model, {"x": x}, stamp=False))
    assert Layer.forward is before
    assert all(type(layer.layer_idx) is int for layer in model.layers)
    assert "layer_idx" not in vars(Layer)
    other = torch.randn(5, 4)
    torch.testing.assert_close(graph(x=other), model(other))


def test_layers_that_host_adapters_are_copied(copies: list[str]) -> None:
    """What adapters put beside the modules of a layer differs from layer to layer, and does not run in a capture."""
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target="all-linear"))
    assert adapted.road == "modules"
    copies.clear()
    graph = adapted.graph(view="decode", adapted=False)
    assert len(copies) == 2
    adapted.remove()
    assert text(graph) == text(captured(model, "decode", stamp=False))


DRY = [*(f"{name} decode" for name in CAUSAL), *(f"{name} decoder" for name in ("t5", "bart", "whisper"))]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls that did not run in a dry run, because equal layers had."""
    found: list[object] = []
    again = _Seen.again

    def noting(self: _Seen, call: object) -> object:
        found.append(call)
        return again(self, call)  # type: ignore[arg-type]

    monkeypatch.setattr(_Seen, "again", noting)
    return found


@pytest.mark.parametrize("case", but_for({*DRY} - {"gemma3 decode", "lfm2 decode", "t5 decoder"}, DRY))
def test_a_dry_run_of_equal_layers_finds_the_view_of_a_whole_one(
    case: str, given: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, view = case.split()
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    one = find_view(model, view)
    assert given
    monkeypatch.setattr(dry_run, "equal_layers_run_twice", lambda *_: nullcontext())
    assert find_view(model, view) == one


@pytest.mark.parametrize(
    ("way", "count"),
    [("none", 4), ("attribute", 0), ("buffer", 3), ("compares", 0), ("computes", 0), ("config", 3), ("writes", 0)],
)
def test_what_differs_runs_in_a_dry_run(way: str, count: int, given: list[object]) -> None:
    model = Stack(way)
    with dry_run.fake_run(model) as fake:
        assert model(fake(torch.randn(3, 4))).shape == (3, 4)
    assert len(given) == count
