"""Generation with an adapter: token for token what `peft` generates, by transformers' own `generate`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from support.decoding import Pair, make_pair, prompts
from support.zoo import ZOO
from torch import Tensor

import peftfx


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`pair(name)`: a model with a random LoRA of `peft`, and the same in peftfx, by the decode view's graph."""

    @cache
    def make(name: str) -> Pair:
        return make_pair(name, tmp_path_factory.mktemp(name))

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        pytest.param({"do_sample": True, "num_beams": 2}, marks=pytest.mark.slow),
        {"use_cache": False},
        pytest.param({"prefill_chunk_size": 3}, marks=pytest.mark.slow),
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("name", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_every_way_of_transformers_gives_pefts_tokens(pair: Any, name: str, options: dict[str, Any]) -> None:
    inputs = prompts(1) if "prompt_lookup_num_tokens" in options else prompts()
    results = []
    for model in (pair(name).peft, pair(name).ours, pair(name).modules):
        torch.manual_seed(3)
        results.append(model.generate(**inputs, **{"do_sample": False, **options}, max_new_tokens=12))
    assert torch.equal(*results[:2])
    assert torch.equal(*results[1:])


def test_scores_cache_and_streamer_are_those_of_transformers(pair: Any) -> None:
    class Collects(hf.generation.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    want, got = pair("llama").peft, pair("llama").ours
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    streams = [Collects(), Collects()]
    inputs = prompts(1)
    a, b = (model.generate(**inputs, **options, streamer=s) for model, s in zip((want, got), streams, strict=True))
    assert streams[0].tokens == streams[1].tokens
    assert streams[0].tokens[-1] == -1
    torch.testing.assert_close(torch.stack(b.scores), torch.stack(a.scores), atol=1e-5, rtol=1e-5)
    for theirs, ours in zip(a.cache.layers, b.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
    again = [
        m.generate(input_ids=o.sequences, cache=o.cache, max_new_tokens=4, do_sample=False)
        for m, o in ((want, a), (got, b))
    ]
    assert torch.equal(*again)


def test_generating_leaves_the_base_as_it_was(pair: Any) -> None:
    got = pair("llama").modules
    kind, names = type(got.base), {n for n, _ in got.base.named_modules()}
    before = set(vars(got.base))
    got.generate(**prompts(), max_new_tokens=2)
    assert type(got.base) is kind
    assert {n for n, _ in got.base.named_modules()} == names
    assert set(vars(got.base)) == before


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"cache_implementation": "static"}, "static"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
        ({"cache": hf.StaticCache(config=ZOO["llama"].make().config, max_cache_len=16)}, "StaticLayer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_graph_cannot_give_is_refused(pair: Any, arguments: dict[str, Any], what: str) -> None:
    got = pair("llama").ours
    inputs = {} if "inputs_embeds" in arguments else prompts()
    with pytest.raises(peftfx.PeftfxError, match=what):
        got.generate(**inputs, **arguments, max_new_tokens=2)


def test_a_sliding_cache_of_the_callers_is_refused_and_no_cache_is_needed(pair: Any) -> None:
    theirs, got = pair("mistral").peft, pair("mistral").ours
    given = {"cache": hf.DynamicCache(config=got.base.config), "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(peftfx.PeftfxError, match="DynamicSlidingWindowLayer"):
        got.generate(**prompts(), **given)
    own = {**given, "cache": hf.DynamicCache(config=got.base.config)}
    assert torch.equal(pair("mistral").modules.generate(**prompts(), **given), theirs.generate(**prompts(), **own))


def test_a_model_that_generates_nothing_says_so() -> None:
    adapted = peftfx.transform(ZOO["bert"].build(), peftfx.LoRA(r=2, target="attention.query"))
    with pytest.raises(peftfx.PeftfxError, match="does not generate"):
        adapted.generate(**prompts())
