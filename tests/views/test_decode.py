"""The decode view: one graph, cache in and out, gives in pieces what the forward gives at once, and `peft`'s tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from every_model.checks import build
from support.decoding import GREEDY, Pair, in_pieces, make_pair, text
from support.few import but_for, few
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

import peftfx
import peftfx.runtime
from peftfx.caches.held import kept_by
from peftfx.caches.states import StateLayer
from peftfx.export.command import export_directory
from peftfx.generation.step import Generates
from peftfx.model.adapted import AdaptedModel
from peftfx.views.capture import capture
from peftfx.views.decode import PRESENT, Decode, positions
from peftfx.views.finding.decode_view import decode_view
from peftfx.views.finding.named_views import find_view

OWN_CACHE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_local_experts": 2,
    "head_dim": 8,
}
CAUSAL = [name for name, entry in ZOO.items() if entry.task == "text-generation"]
PIECES = {"one by one": [1] * 9, "prefill, a continuation, single tokens": [4, 3, 1, 1], "at once": [9]}


@pytest.fixture(scope="session", params=few(CAUSAL))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Each causal model of the zoo in turn."""
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def adapted(pair: Pair) -> AdaptedModel:
    return pair.ours


def test_greedy_tokens_are_pefts(pair: Pair) -> None:
    given, want = pair.greedy
    assert torch.equal(pair.ours.generate(**given, **GREEDY), want)
    assert torch.equal(pair.modules.generate(**given, **GREEDY), want)
    with pair.ours.disable_adapter():
        assert not torch.equal(pair.ours.generate(**given, **GREEDY), want)


def test_onnx_runtime_generates_them_too(pair: Pair, tmp_path: Path) -> None:
    report = pair.ours.export(tmp_path / "out", view="decode", assets=pair.ours.base.config.save_pretrained)
    assert report.engine == "fast"
    past = {shapes["past_key_values.*.key"][2] for shapes in report.probes}
    assert 0 in past
    assert len(past) > 1
    served = peftfx.runtime.load(tmp_path / "out")
    given, want = pair.greedy
    assert torch.equal(served.generate(**given, **GREEDY), want)


@torch.no_grad()
@pytest.mark.parametrize("lengths", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("batch", [1, 3])
def test_in_pieces_it_computes_what_the_forward_computes_at_once(
    adapted: AdaptedModel, batch: int, lengths: list[int]
) -> None:
    ids, mask = text(batch, sum(lengths))
    whole = {"input_ids": ids, "attention_mask": mask}
    if adapted.view("decode").positions:  # type: ignore[union-attr]
        whole["position_ids"] = positions(mask)
    want = adapted(**whole).logits
    got = torch.cat(list(in_pieces(adapted, ids, mask, lengths)), 1)
    shown = mask.bool()
    torch.testing.assert_close(got[shown], want[shown], atol=1e-5, rtol=1e-5)
    with adapted.disable_adapter():
        assert float((adapted(**whole).logits - want)[shown].abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_what_generates_is_exported_with_its_cache_where_nobody_says(name: str, tmp_path: Path) -> None:
    adapted = peftfx.transform(ZOO[name].build(), peftfx.LoRA(r=2))
    report, forward = adapted.export(tmp_path / "out"), adapted.export(tmp_path / "forward", view="forward")
    assert any(name.startswith(PRESENT) for name in report.outputs) == (name == "gpt2")
    assert not any(name.startswith(PRESENT) for name in forward.outputs)


def test_its_sites_are_those_of_the_forward(adapted: AdaptedModel) -> None:
    """In all but the names of the nodes where they run: an export finds them on the one view that it captures."""
    forward, decode = (adapted.graph(adapted=False, view=view).sites for view in ("forward", "decode"))
    apart = ([dataclasses.replace(site, calls=()) for site in sites] for sites in (forward, decode))
    assert next(apart) == next(apart)
    assert forward.called == decode.called


@pytest.mark.usefixtures("capture_each")
@pytest.mark.parametrize("view", but_for({"forward"}, ["auto", "forward"]))
def test_an_export_from_files_makes_one_capture(view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ZOO["llama"].build()
    base.save_pretrained(tmp_path / "base")
    peftfx.transform(base, peftfx.LoRA(r=2, target="all-linear")).save_pretrained(tmp_path / "adapter")
    count, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: count.append(0) or export(*args, **kwargs))
    report = export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", view=view)
    assert any(name.startswith(PRESENT) for name in report.outputs) == (view == "auto")
    assert len(count) == 1


def test_its_names_and_axes_are_those_that_runtimes_know(adapted: AdaptedModel) -> None:
    graph, view = adapted.graph(view="decode"), adapted.view("decode")
    assert isinstance(view, Decode)
    shapes = {spec.name: spec.shape for spec in graph.inputs}
    assert shapes["input_ids"] == ("batch", "sequence")
    assert shapes["attention_mask"] == ("batch", "total")
    assert shapes.get("position_ids", ("batch", "sequence")) == ("batch", "sequence")
    caches = [shapes[name] for name in view.past_names]
    assert all((s[0], s[2]) == ("batch", "past") and isinstance(s[1], int) and isinstance(s[3], int) for s in caches)
    assert graph.outputs == ("logits", *view.present_names)


def test_each_view_has_a_graph_of_its_own_and_both_follow_the_adapters() -> None:
    model = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(r=2, target="attention.query"), seed=0)
    assert model.graph(view="decode") is model.graph(view="decode")
    assert model.graph(view="decode") is not model.graph()
    with_adapter = model.graph(view="decode").text()
    with model.disable_adapter():
        assert model.graph(view="decode").text() != with_adapter


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: hf.MiniMaxForCausalLM(hf.MiniMaxConfig(**TOKENS, **OWN_CACHE)), "does not run with a plain"),
        (lambda: ZOO["bert"].build(), "no key/value cache"),
    ],
    ids=["a cache of its own", "encoder"],
)
def test_a_model_without_such_a_cache_is_refused_by_name(make: Callable[[], nn.Module], what: str) -> None:
    model = make().eval()
    with pytest.raises(peftfx.PeftfxError, match=what) as raised:
        find_view(model, "decode")
    assert "forward view" in raised.value.hint


def test_an_unknown_view_is_refused_with_the_nearest() -> None:
    adapted = peftfx.transform(ZOO["gpt2"].build(), peftfx.LoRA(r=2, target="attention.qkv"))
    with pytest.raises(peftfx.PeftfxError, match="no view 'decoed'") as raised:
        adapted.graph(view="decoed")
    assert "decode" in raised.value.hint


def test_a_large_model_is_checked_at_fewer_sizes_each_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("peftfx.export.verification.cases._LARGE", 0)
    report = peftfx.model.api.bare(ZOO["gpt2"].build()).export(tmp_path / "out", view="decode")
    seen = {tuple(shapes["past_key_values.*.key"]) for shapes in report.probes}
    assert {past for _, _, past, _ in seen} == {0, 1, 6}
    assert {batch for batch, _, _, _ in seen} == {1, 2}


def test_what_a_cache_forgets_and_the_mask_shows_is_out_of_reach() -> None:
    """Moshi's mask shows every token, and its cache forgets all but the last: what a step sees is the cache's."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16, "vocab_size": 99}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.MoshiForCausalLM(hf.MoshiConfig(**sizes, sliding_window=4, max_position_embeddings=64)).eval()
    view = decode_view(model)
    assert [layer.window for layer in view.layers] == [4, 4]
    graph = capture(model, view.inputs(model), axes=view.axes, call=view)
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = hf.DynamicCache(config=model.config)
    past = {name: kept.empty(2) for name, kept in zip(view.past_names, kept_by(view.layers), strict=True)}
    for start, end in ((0, 6), (6, 7), (7, 9)):
        mask = torch.ones(2, end, dtype=torch.long)
        given = {"input_ids": ids[:, start:end], "attention_mask": mask, "position_ids": positions(mask)[:, start:]}
        with torch.no_grad():
            want = model(**given, cache=cache, use_cache=True).logits
            values = graph.run(*({**given, **past}[spec.name] for spec in graph.inputs))
        got = dict(zip(graph.outputs, values, strict=True))
        torch.testing.assert_close(got["logits"], want, atol=1e-5, rtol=1e-5)
        past = {name: got[kept] for name, kept in zip(view.past_names, view.present_names, strict=True)}


def test_a_mask_that_slides_needs_no_window() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = hf.MistralForCausalLM(hf.MistralConfig(**sizes, intermediate_size=16, vocab_size=99, sliding_window=4))
    assert [layer.window for layer in decode_view(model).layers] == [None]


@torch.no_grad()
def test_positions_that_a_call_leaves_out_are_counted_as_by_the_model(tmp_path: Path) -> None:
    """OPT counts the tokens that the mask shows, GPT-2 a row's places. A step goes on from either padding."""
    ids, mask = text(3, 7)
    mask[0, 4:] = 0
    for name in ("opt", "gpt2"):
        model = ZOO[name].build()
        peftfx.export_onnx(model, tmp_path / name, view="decode")
        served = peftfx.runtime.load(tmp_path / name)
        want = model(input_ids=ids, attention_mask=mask, use_cache=True)
        got = served(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(got.logits[mask.bool()], want.logits[mask.bool()], atol=1e-4, rtol=1e-4)
        step = {"input_ids": ids[:, :2], "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :2])], 1)}
        want = model(**step, cache=want.cache)
        torch.testing.assert_close(served(**step, cache=got.cache).logits, want.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_counts_in_its_own_way_needs_its_positions(tmp_path: Path) -> None:
    """CamemBERT's code counts from the padding's token on, and `generate` gives it positions that count from 0."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.CamembertConfig(**TOKENS, **sizes, max_position_embeddings=64, type_vocab_size=1, is_decoder=True)
    model = hf.CamembertForCausalLM(config).eval()
    peftfx.export_onnx(model, tmp_path / "out", view="decode")
    served, (ids, mask) = peftfx.runtime.load(tmp_path / "out"), text(2, 6)
    with pytest.raises(peftfx.PeftfxError, match="counts positions in a way of its own") as raised:
        served(input_ids=ids, attention_mask=mask)
    assert "position_ids" in raised.value.hint
    given = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(served.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    want = model(**given, position_ids=positions(mask) + 3).logits
    got = served(**given, position_ids=positions(mask) + 3).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)


def test_a_model_that_does_not_write_token_by_token_is_refused() -> None:
    """Some write whole pieces of a text by diffusion: their logits are not those of a text's tokens."""
    model = build("text-generation", "llama")
    own = model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None, **rest: Any) -> Any:
        output = own(input_ids=input_ids, attention_mask=attention_mask, cache=cache, **rest)
        output.logits = torch.cat([output.logits] * 4, dim=1)
        return output

    model.forward = forward  # type: ignore[method-assign]
    with pytest.raises(peftfx.PeftfxError, match="logits for 12 tokens where a text has 3: it does not write token by"):
        find_view(model, "decode")


@pytest.mark.parametrize("lengths", [(5, 1, 2, 1), (1, 1, 6), (3, 4)])
def test_a_layer_of_states_is_transformers_own(lengths: tuple[int, ...]) -> None:
    ours, theirs = StateLayer(2), LinearAttentionLayer(2)
    random = torch.Generator().manual_seed(0)
    for length in lengths:
        new, state = torch.randn(2, 3, length, generator=random), torch.randn(2, 4, generator=random)
        for layer in (0, 1):
            got, want = (x.update_conv_state(new, layer, conv_kernel_size=3 + layer) for x in (ours, theirs))
            assert torch.equal(got, want)
        assert torch.equal(ours.update_recurrent_state(state, 1), theirs.update_recurrent_state(state, 1))
        for name in ("conv_states", "recurrent_states"):
            pairs = zip(getattr(ours, name).values(), getattr(theirs, name).values(), strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
        assert ours.has_previous_state == theirs.has_previous_state
    ours.reorder_cache(torch.tensor([1, 0]))
    theirs.reorder_cache(torch.tensor([1, 0]))
    ours.batch_repeat_interleave(2)  # theirs has no such method; what a layer of keys does
    ours.batch_select_indices(torch.tensor([3, 0, 1]))
    for name, number in (("conv_states", 0), ("recurrent_states", 1)):
        rows = getattr(theirs, name)[number]
        assert torch.equal(getattr(ours, name)[number], rows[[1, 0, 0]]), name


def test_a_cache_of_states_alone_counts_its_tokens() -> None:
    """No layer of such a cache knows how many tokens it has read."""
    model = build("text-generation", "mamba")
    view = find_view(model, "decode")
    assert isinstance(view, Decode)
    steps = Generates()
    steps.view, steps.step = view, lambda inputs, _: view(model, inputs)
    ids, cache = text(2, 7)[0], steps.new_cache()
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7)):
            got = steps.forward(ids[:, start:end], cache=cache).logits
            assert cache.get_seq_length() == end
        torch.testing.assert_close(got[:, -1], model(ids).logits[:, -1], atol=1e-5, rtol=1e-5)
