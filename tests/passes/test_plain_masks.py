"""Masks that hide nothing, or the future alone, are left out for a call: its attention is the model's own then."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from support.adapted import adapt
from support.zoo import ZOO
from torch import Tensor
from torch.nn.attention import SDPBackend

import peftfx
from peftfx.graph.graph import Graph
from peftfx.model.adapted import AdaptedModel
from peftfx.passes.optimization.plain_masks import kind_of

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FEW = ("gemma2", "gpt2", "t5", "mistral", "bert", "roberta", "opt", "vit", "whisper", "qwen3")


def made(maker: type[hf.PreTrainedModel], config: object, road: str) -> AdaptedModel:
    torch.manual_seed(0)
    rule = peftfx.LoRA(target="all-linear", init_lora_weights=False)
    return peftfx.transform(maker(config), rule, road=road, seed=0)  # type: ignore[arg-type]


def grouped(road: str) -> AdaptedModel:
    return made(hf.LlamaForCausalLM, hf.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZE), road)


@pytest.fixture(scope="module")
def roads() -> tuple[AdaptedModel, AdaptedModel]:
    return grouped("modules").train(), grouped("graph").train()


def ran(model: AdaptedModel) -> Graph:
    """The graph that the last call ran."""
    return [*model.graphs.runs._swept.values()][-1][1]


def attentions(graph: Graph) -> list[tuple[bool, bool, bool]]:
    """Of each fused attention: whether it has a mask, is causal, and has grouped heads."""
    nodes = [node for node in graph.nodes() if node.target is ATTENTION]
    return [(n.args[3] is not None, n.args[5:] == (True,), bool(n.kwargs.get("enable_gqa"))) for n in nodes]


MASKS = {"none": None, "whole": torch.ones(2, 9, dtype=torch.long)}


@pytest.mark.parametrize("mask", MASKS)
def test_a_text_without_padding_is_causal_and_grouped(roads: tuple[AdaptedModel, AdaptedModel], mask: str) -> None:
    ids = torch.arange(18).view(2, 9)
    inputs = {"input_ids": ids, "labels": ids}
    if MASKS[mask] is not None:
        inputs["attention_mask"] = MASKS[mask]
    want, got = (model(**inputs) for model in roads)
    assert attentions(ran(roads[1])) == [(False, True, True)] * 2
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-6, atol=1e-6)
    kept = [*roads[1].graph(inputs).nodes()]
    assert len(kept) > len([*ran(roads[1]).nodes()])
    assert all(n.args[3] is not None for n in kept if n.target is ATTENTION)  # what is exported keeps its mask


def test_padding_on_the_left_keeps_its_mask(roads: tuple[AdaptedModel, AdaptedModel]) -> None:
    ids, mask = torch.arange(18).view(2, 9), torch.ones(2, 9, dtype=torch.long)
    roads[1](input_ids=ids, attention_mask=mask)
    mask[0, :4] = 0
    want, got = (model(input_ids=ids, attention_mask=mask).logits for model in roads)
    swept = roads[1].graphs.runs.swept(roads[1].graph({"input_ids": ids, "attention_mask": mask}))
    assert all(masked for masked, _, _ in attentions(swept))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_window_that_is_shorter_than_the_text_is_not_left_out() -> None:
    config = hf.MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=4, **SIZE)
    models = [made(hf.MistralForCausalLM, config, road) for road in ("modules", "graph")]
    for length, plain in ((3, True), (9, False)):
        want, got = (model(input_ids=torch.arange(length)[None]).logits for model in models)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert [mask for mask, _, _ in attentions(ran(models[1]))] == [not plain] * 2


LOW = torch.finfo(torch.float32).min
TRIL = torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (TRIL.expand(2, 1, 5, 5), "causal"),
        (torch.ones(2, 1, 1, 7, dtype=torch.bool), "everything"),
        (torch.zeros(2, 1, 3, 7), "everything"),
        (torch.zeros(5, 5).masked_fill(~TRIL, LOW), "causal"),
        (torch.zeros(5, 5).masked_fill(~TRIL, float("-inf")), "causal"),
        (torch.zeros(5, 5).masked_fill(~TRIL, -10.0), ""),
        (torch.ones(5, 5), ""),
        (TRIL.T, ""),
        (TRIL[:4], ""),
        (torch.ones(3, 5, dtype=torch.bool).tril(2), ""),
        (torch.cat([TRIL[None], TRIL.T[None]]), ""),
        (TRIL.tril(-1), ""),
        (torch.ones(1, 1, dtype=torch.bool), "everything"),
    ],
)
def test_what_a_mask_shows(mask: Tensor, kind: str) -> None:
    assert kind_of(mask) == kind


def test_a_call_that_needs_flash_attention_has_it(roads: tuple[AdaptedModel, AdaptedModel]) -> None:
    with torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        roads[1](input_ids=torch.arange(18).view(2, 9))


def test_a_config_that_asks_for_no_cache_needs_no_other_capture(roads: tuple[AdaptedModel, AdaptedModel]) -> None:
    model, ids = roads[1], torch.arange(18).view(2, 9)
    model(input_ids=ids)
    before = [len(states) for states in model.graphs._captured.values()]
    model.base.config.use_cache = not model.base.config.use_cache
    model(input_ids=ids)
    assert [len(states) for states in model.graphs._captured.values()] == before
    model.base.config.use_cache = True


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_the_graph_is_the_model_with_and_without_padding(name: str) -> None:
    model = adapt(name, peftfx.LoRA(target="all-linear")).eval()
    inputs, found = ZOO[name].inputs(model=model.base), []
    for _ in range(2):
        for model.wanted in (None, "graph"):
            assert model.road == (model.wanted or "modules")
            found.append(model(**inputs)[0])
        torch.testing.assert_close(found[-1], found[-2], rtol=1e-5, atol=1e-5)
        inputs = {key: value for key, value in inputs.items() if not key.endswith("attention_mask")}
