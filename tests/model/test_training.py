"""A step of training by other roads: under autocast, compiled; and what of a graph is run."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import training
from support.adapted import adapt, both, our_name, randomise, step
from support.zoo import ZOO
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftfx
from peftfx.model.adapted import AdaptedModel

PROMPT = peftfx.PromptTuning(num_virtual_tokens=2)
CPT = peftfx.CPT(cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4])
WHOLE = [  #: models, methods, and whether a compiled call is one graph
    ("llama", peftfx.OFT(target="attention", oft_block_size=8), True),
    ("llama", peftfx.PrefixTuning(num_virtual_tokens=3), True),
    ("llama", PROMPT, True),
    pytest.param("t5", PROMPT, True, marks=pytest.mark.further),
    pytest.param("bert", peftfx.PTuning(num_virtual_tokens=2, encoder_hidden_size=8), True, marks=pytest.mark.further),
    pytest.param("llama", CPT, True, marks=pytest.mark.further),
    ("llama", peftfx.LlamaAdapter(), False),
]
FIRST, SECOND = peftfx.LoRA(r=4, lora_alpha=6, target="all-linear"), peftfx.IA3(target="attention.key")


class TestAutocast:
    def test_a_step_is_pefts_and_near_that_of_float32(self, tmp_path: Path) -> None:
        ours, theirs = both("bert", tmp_path, target_modules=["query", "value", "output.dense"])
        inputs = ZOO["bert"].inputs(model=ours.base, labels=True)
        whole = step(ours, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = step(ours, inputs), step(theirs, inputs)
        assert got.keys() == whole.keys()
        assert all(t.dtype == torch.float32 for t in got.values())
        named = {name if name == "loss" else f"adapters.default.{our_name(name)}": t for name, t in want.items()}
        assert named.keys() == got.keys()
        ours_off, theirs_off = (max(distance(g[name], t) for name, t in whole.items()) for g in (got, named))
        assert 1e-4 < ours_off < 0.05
        assert ours_off < 2 * theirs_off  # each is rounding, in an order of its own


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    """Two adapters with random values."""
    adapted = adapt("llama", FIRST)
    adapted.add_adapter("second", SECOND)
    randomise(adapted)
    return adapted


class TestCompiled:
    """What `torch.compile` makes is the model, for each choice of adapters; to it, the model is one graph."""

    def is_the_model(self, adapted: AdaptedModel, compiled: Callable[..., object], sequence: int = 7) -> None:
        inputs = ZOO["llama"].inputs(sequence=sequence, model=adapted.base, labels=True)
        want, got = step(adapted, inputs), step(adapted, inputs, compiled)
        assert got.keys() == want.keys()
        assert len(want) > 1
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def test_each_choice_of_adapters_is_one_graph(self, adapted: AdaptedModel) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(adapted, backend=counter)
        for count, names in enumerate(("default", "second", ["default", "second"]), 1):
            adapted.set_adapter(names)
            self.is_the_model(adapted, compiled)
            assert counter.frame_count == count
        self.is_the_model(adapted, compiled)
        assert counter.frame_count == count

    def test_a_graph_is_compiled_whole(self, adapted: AdaptedModel) -> None:
        torch._dynamo.reset()
        adapted.set_adapter("default")
        inputs = ZOO["llama"].inputs(model=adapted.base, labels=True)
        graph = adapted.graph(inputs)
        compiled = torch.compile(graph.module, backend="eager", fullgraph=True)  # it was not run before
        got = dict(zip(graph.outputs, compiled(*(inputs[spec.name] for spec in graph.inputs)), strict=True))
        torch.testing.assert_close(got["loss"], adapted(**inputs).loss)

    def test_a_block_without_adapters_has_none(self, adapted: AdaptedModel) -> None:
        torch._dynamo.reset()
        adapted.set_adapter("default")
        inputs = ZOO["llama"].inputs(model=adapted.base)
        compiled = torch.compile(adapted, backend="eager")
        with torch.no_grad():
            before, want = compiled(**inputs).logits, adapted.base(**inputs).logits
            with adapted.disable_adapter():
                torch.testing.assert_close(compiled(**inputs).logits, want)
            assert not torch.allclose(before, want)
            torch.testing.assert_close(compiled(**inputs).logits, before)

    @pytest.mark.further
    def test_it_may_be_compiled_before_any_other_call_of_its_thread(self, adapted: AdaptedModel) -> None:
        torch._dynamo.reset()
        adapted.set_adapter("default")
        compiled = torch.compile(adapted, backend="eager")

        def calls() -> list[Tensor]:
            return [compiled(**ZOO["llama"].inputs(sequence=s, model=adapted.base)).logits for s in (7, 7, 9)]

        with ThreadPoolExecutor(1) as thread:  # a new thread, in which no model has run
            first, again, longer = thread.submit(calls).result()
        assert torch.equal(first, again)
        torch.testing.assert_close(longer, adapted(**ZOO["llama"].inputs(sequence=9, model=adapted.base)).logits)

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_by_torchs_own_backends_at_another_length(self, adapted: AdaptedModel, backend: str) -> None:
        if backend == "inductor" and shutil.which("c++") is None:
            pytest.skip("inductor needs a C++ compiler")
        torch._dynamo.reset()
        compiled = torch.compile(adapted, backend=backend)
        for names in ("default", "second"):
            adapted.set_adapter(names)
            for sequence in (7, 11):
                self.is_the_model(adapted, compiled, sequence)

    @pytest.mark.parametrize(
        ("name", "rule", "whole"), WHOLE, ids=lambda v: v if isinstance(v, str) else type(v).__name__
    )
    def test_a_step_of_a_method_is_the_same(self, name: str, rule: object, whole: bool) -> None:
        """Some ended the graph, where `peft` does not; LLaMA-Adapter raised an error of Python's."""
        torch._dynamo.reset()
        model = adapt(name, rule).eval()
        if not whole:  # nor must it matter that the attention's own code ends a graph
            output = model.base.model.layers[0].self_attn.o_proj
            output.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        compiled = torch.compile(model, backend="eager", fullgraph=whole)
        for sequence in (5, 9):
            inputs = ZOO[name].inputs(sequence=sequence, model=model.base, labels=rule is not CPT)
            got, want = (step(model, inputs, learning(call)) for call in (compiled, model))
            assert len(want) > 1
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def test_hooks_of_others_at_the_embedding_see_the_text_alone(self) -> None:
        torch._dynamo.reset()
        model, inputs = adapt("llama", PROMPT).eval(), ZOO["llama"].inputs(sequence=5)
        plain = model(**inputs).logits
        model.base.model.embed_tokens.register_forward_hook(lambda _, args, y: y * (args[0].shape[1] == 5) * 2)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        want = model(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, want)
        torch.testing.assert_close(want[:, :2], plain[:, :2])  # the virtual tokens
        assert not torch.allclose(want[:, -1], plain[:, -1])

    @pytest.mark.parametrize("same", [False, True])
    def test_a_second_text_as_long_as_the_first_has_no_virtual_tokens(self, same: bool) -> None:
        """By its axes alone the second was the first, of 4 tokens and 2 virtual ones."""
        torch._dynamo.reset()
        example = {"ids": torch.randint(30, (2, 5)), "other": torch.randint(30, (2, 9))}
        model = peftfx.transform(Twice(same).eval(), PROMPT, inputs=example, road="modules")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        inputs = {"ids": torch.randint(30, (2, 4)), "other": torch.randint(30, (2, 6))}
        torch.testing.assert_close(compiled(**inputs), model(**inputs))


class Twice(nn.Module):
    """A model that embeds a text, and then another one, or the same one again."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.same, self.words, self.out = same, nn.Embedding(30, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, other: Tensor) -> Tensor:
        first = self.words(ids).mean(1, keepdim=True)
        return self.out(self.words(ids.clone() if self.same else other) * first) + other.sum()


def learning(call: Callable[..., Any]) -> Callable[..., object]:
    """A call with a loss; CPT takes no labels, and its loss is computed from the logits."""

    def run(**inputs: Tensor) -> object:
        output = call(**inputs)
        return output if "labels" in inputs else SimpleNamespace(loss=CPT.loss(output.logits, inputs["input_ids"]))

    return run


def test_a_product_that_nobody_reads_is_not_run_and_can_be_restored() -> None:
    """IA3 computes the output of a feed-forward layer anew: the base's own is there for `remove` alone."""
    adapted = adapt("llama", peftfx.IA3(target="mlp.down"))
    inputs = ZOO["llama"].inputs(model=adapted.base)
    base, kept = adapted.graph(inputs, adapted=False), adapted.graph(inputs)
    before = kept.text()
    run = adapted.graphs.runs.swept(kept)
    assert kept.text() == before
    counts = [[n.target for n in g.nodes()].count(torch.ops.aten.linear.default) for g in (base, run, kept)]
    assert counts == [counts[0], counts[0], counts[0] + 2]
    with torch.no_grad():
        assert torch.equal(adapted(**inputs).logits, kept(**inputs).logits)  # type: ignore[attr-defined]


def test_the_benchmark_compares_what_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(training, "SIZES", sizes)
    method, (model, _) = training.ROWS["IA3"]
    ours, theirs = training.compare(method, model, 2)
    assert len(ours.wall) == len(theirs.cpu) == 2
    assert 0.5 < ours.memory / theirs.memory < 1.1
    base = model.make(0.0)
    other = peft.get_peft_model(copy.deepcopy(base), method.configured(model, 0.0))
    assert sum(p.requires_grad for p in other.parameters()) == 6
