"""Caches of states: convolutions, recurrences and indexers go in and out of the decode view as keys and values do."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.few import but_for
from support.zoo import TOKENS
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.caches.held import kept_by
from peftfx.export.deployment.genai_config import GENAI_CONFIG
from peftfx.formats import REPORT
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.views.decode import Decode, positions

pytestmark = pytest.mark.further

_SIZES = {**TOKENS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_SCANS = {"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts_per_tok": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
_INDEX = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}  # with fewer, ties decide
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions between attentions": (
        "lfm2",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "both in one layer": ("falcon_h1", {"num_hidden_layers": 2, "mamba_d_ssm": 64, **_MAMBA}),
    "recurrences between attentions": ("bamba", {"num_hidden_layers": 2, "attn_layer_indices": [1], **_MAMBA}),
    "recurrences alone": ("mamba2", {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "an indexer's keys": (
        "deepseek_v32",
        {"num_hidden_layers": 2, "num_key_value_heads": 4, **_LATENT, **_EXPERTS, **_INDEX},
    ),
}
#: States of float32 in a model of half precision; behind attentions, and alone with logits of float32, too.
HALVED: dict[str, dict[str, Any]] = {
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, **_SCANS},
    "mamba": {"num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
}
_SMALL_STATES = {"mamba2": {"state_size": 8, "chunk_size": 4}}
QUICK = "convolutions between attentions"


def build(name: str) -> nn.Module:
    kind, fields = MODELS[name] if name in MODELS else (name, HALVED[name])
    sizes = {**_SIZES, **fields, **_SMALL_STATES.get(kind, {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **sizes))
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


Case = tuple[nn.Module, AdaptedModel, Path]


@pytest.fixture(scope="module", params=but_for(set(MODELS) - {QUICK}, MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model with a random LoRA of `peft`; the same in peftfx; and exported."""
    directory = tmp_path_factory.mktemp("states")
    torch.manual_seed(0)
    named = build(request.param).named_modules()
    plain = [n for n, m in named if isinstance(m, nn.Linear) and not n.endswith(("out_proj", "lm_head", "gate"))]
    theirs = peft.get_peft_model(build(request.param), peft.LoraConfig(r=4, target_modules=plain)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(directory / "adapter"))
    ours = peftfx.load(build(request.param), directory / "adapter", road="graph")
    ours.export(directory / "out", view="decode", assets=ours.base.config.save_pretrained)
    return theirs, ours, directory / "out"


def greedy(model: Any, batch: int, **options: object) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were chosen by; the second of two prompts is padded on the left."""
    ids = torch.randint(4, 99, (2, 7), generator=torch.Generator().manual_seed(1))[:batch]
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.5, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(list(found.logits), 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_generated_tokens_are_pefts_in_torch_and_in_onnx_runtime(case: Case, batch: int) -> None:
    theirs, ours, directory = case
    tokens, logits = greedy(theirs, batch)
    for model in (ours, runtime.load(directory)):
        found, steps = greedy(model, batch)
        torch.testing.assert_close(steps, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(found, tokens)


def test_beams_take_their_states_along(case: Case) -> None:
    theirs, ours, directory = case
    want, _ = greedy(theirs, 2, num_beams=3)
    for model in (ours, runtime.load(directory)):
        assert torch.equal(greedy(model, 2, num_beams=3)[0], want)


def test_pieces_of_a_text_leave_what_the_whole_leaves(case: Case) -> None:
    _, ours, _ = case
    view, graph = ours.view("decode"), ours.graph(view="decode")
    assert isinstance(view, Decode)
    ids = torch.randint(4, 99, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def run(pieces: list[int]) -> list[Tensor]:
        past, done, logits = [tensor.empty(2) for tensor in kept_by(view.layers)], 0, []
        for end in itertools.accumulate(pieces):
            given = {"input_ids": ids[:, done:end], "attention_mask": mask[:, :end]}
            given["position_ids"] = positions(mask[:, :end])[:, done:]
            given |= dict(zip(view.past_names, past, strict=True))
            first, *past = graph.run(*(given[spec.name] for spec in graph.inputs))
            logits.append(first)
            done = end
        shown = mask[:, -1:].bool().expand(2, 4)
        return [
            torch.cat(logits, 1)[:, -4:][shown],
            *(p for p, k in zip(past, kept_by(view.layers)) if k.along is None),
        ]

    whole = run([9])
    for pieces in ([4, 1, 3, 1], [1] * 9):
        for got, want in zip(run(pieces), whole, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_its_names_say_what_each_layer_keeps(case: Case) -> None:
    _, ours, directory = case
    view = ours.view("decode")
    assert isinstance(view, Decode)
    names = {kept.name for kept in kept_by(view.layers)}
    assert names & {"conv_state", "recurrent_state", "indexer_key"}
    axes = runtime.load(directory).model.axes
    for name, present, kept in zip(view.past_names, view.present_names, kept_by(view.layers), strict=True):
        assert axes[name] == tuple(named or size for named, size in zip(kept.axes("past"), (None, *kept.shape)))
        assert [axis for axis in axes[present] if isinstance(axis, int)] == [size for size in kept.shape if size]
    assert not (directory / GENAI_CONFIG).exists(), "GenAI knows states by architecture"
    assert "keeps states" in json.loads((directory / REPORT).read_text())["not_written"][GENAI_CONFIG]


def test_a_layer_whose_values_are_kept_is_no_head() -> None:
    """A convolution's state is a layer's output, cut; its role is that of the forward all the same."""
    adapted = bare(build("recurrences between attentions"))
    forward, decode = (adapted.graph(view=view).sites for view in ("forward", "decode"))
    assert [(s.path, s.role) for s in forward] == [(s.path, s.role) for s in decode]
    assert [s.path for s in decode if s.role == "head"] == ["lm_head"]


def test_a_soft_prompt_is_refused_ahead_of_states() -> None:
    adapted = peftfx.transform(build(QUICK), peftfx.PromptTuning(num_virtual_tokens=2))
    with pytest.raises(PeftfxError, match="no place in a cache whose layer 0 keeps conv_state"):
        adapted.graph(view="decode")


KEPT_APART = but_for({"recurrences between attentions"}, ["both in one layer", "recurrences between attentions"])


@pytest.mark.parametrize("name", KEPT_APART)
def test_a_prefix_is_refused_where_layers_keep_states(name: str) -> None:
    """`peft` raises an error there, too: its prefix is a cache of keys and values alone."""
    with pytest.raises(PeftfxError, match="keep states, so a prefix"):
        peftfx.transform(build(name), peftfx.PrefixTuning(num_virtual_tokens=2))


@pytest.mark.parametrize("name", [*KEPT_APART, *but_for(MODELS, ["recurrences alone"])])
@pytest.mark.parametrize("view", but_for({"forward"}, ["forward", "decode"]))
def test_adapters_of_a_model_with_states_are_swapped(name: str, view: str, tmp_path: Path) -> None:
    model, target = build(name), "all-linear & ~/.*out_proj/"  # whose weight the code reads itself
    peftfx.export_onnx(model, tmp_path / "out", slots=target, view=view)
    adapted = peftfx.transform(model, peftfx.LoRA(r=3, target=target))
    randomise(adapted)
    served = runtime.load(tmp_path / "out")
    served.load_adapter(peftfx.export_adapter(adapted, tmp_path / "out", tmp_path / "a"))
    assert "prefix" not in served.model.axes
    for batch in (1, 2):
        ids = torch.randint(4, 99, (batch, 9), generator=torch.Generator().manual_seed(1))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if view == "decode":
            assert torch.equal(greedy(served, batch)[0], greedy(adapted, batch)[0])
        else:
            torch.testing.assert_close(served(**given).logits, adapted(**given).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", HALVED)
def test_a_model_in_float16_keeps_and_gives_float32_where_its_code_does(name: str, tmp_path: Path) -> None:
    """A cache of float16 was refused by the graph, and logits of float32 were in each step of `generate`."""
    model, rounding = build(name).half(), torch.finfo(torch.float16).eps
    peftfx.export_onnx(model, tmp_path / "out", view="decode")
    served = runtime.load(tmp_path / "out")
    kinds = {served.model.types[n] for n in served.model.inputs if n.endswith("recurrent_state")}
    assert kinds == {"tensor(float)"}
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    found, want = (m.generate(**given, **how, do_sample=False) for m in (served, model))
    torch.testing.assert_close(found.sequences, want.sequences)
    for a, b in zip(found.logits, want.logits, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=8 * rounding * float(b.abs().max()))
