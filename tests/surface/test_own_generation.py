"""What no graph does, `generate` does in the base's own modules, as in `peft`."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peftfx
from peftfx import AdaptedModel, PeftfxError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NAMES = ["default", "b", "__base__"]


def both(base: nn.Module, **ends: list[str]) -> tuple[peft.PeftModel, AdaptedModel]:
    """`peft`'s model with random adapters of these names, and ours with the same."""
    torch.manual_seed(1)
    configs = {n: peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM") for n, targets in ends.items()}
    theirs = peft.get_peft_model(copy.deepcopy(base), configs.pop("default"))
    for name, config in configs.items():
        theirs.add_adapter(name, config)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.5)
    return theirs.eval(), peftfx.load(theirs).eval()


@pytest.fixture(scope="module")
def llamas() -> tuple[peft.PeftModel, AdaptedModel]:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, vocab_size=60, eos_token_id=59, attn_implementation="eager")
    return both(hf.LlamaForCausalLM(config), default=["q_proj", "v_proj", "down_proj"], b=["q_proj", "o_proj"])


def prompt() -> dict[str, Tensor]:
    ids = torch.randint(1, 59, (3, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def test_hidden_states_and_attentions_are_pefts(llamas: tuple[peft.PeftModel, AdaptedModel]) -> None:
    asked = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    got, want = (model.generate(**prompt(), **GREEDY, **asked) for model in llamas[::-1])
    assert got.sequences.equal(want.sequences)
    for kind in ("hidden_states", "attentions"):
        for ours, theirs in zip(getattr(got, kind), getattr(want, kind), strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other)
    in_config = hf.GenerationConfig(**GREEDY, output_hidden_states=True, return_dict_in_generate=True)
    assert llamas[1].generate(**prompt(), generation_config=in_config).hidden_states is not None


def test_a_prompt_of_embeddings_is_continued_as_by_peft(llamas: tuple[peft.PeftModel, AdaptedModel]) -> None:
    theirs, ours = llamas
    given = {**prompt(), "inputs_embeds": theirs.get_input_embeddings()(prompt()["input_ids"]).detach()}
    del given["input_ids"]
    want = theirs.generate(**given, **GREEDY)
    assert ours.generate(**given, **GREEDY).equal(want)
    with ours.disable_adapter(), theirs.disable_adapter():
        base = theirs.generate(**given, **GREEDY)
        assert ours.generate(**given, **GREEDY).equal(base)
    assert not base.equal(want)


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_each_row_has_the_adapter_of_its_name(
    beams: dict[str, int], llamas: tuple[peft.PeftModel, AdaptedModel]
) -> None:
    got, want = (model.generate(**prompt(), **GREEDY, **beams, adapter_names=NAMES) for model in llamas[::-1])
    assert got.equal(want)
    assert not got.equal(llamas[1].generate(**prompt(), **GREEDY, **beams))


def test_a_cache_of_one_size_is_taken(llamas: tuple[peft.PeftModel, AdaptedModel]) -> None:
    got, want = (m.generate(**prompt(), **GREEDY, cache_implementation="static") for m in llamas[::-1])
    assert got.equal(want)


def test_a_model_without_a_cache_generates_as_in_peft() -> None:
    torch.manual_seed(0)
    base = hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=60))
    theirs, ours = both(base, default=["c_attn"])
    assert ours.generate(**prompt(), **GREEDY).equal(theirs.generate(**prompt(), **GREEDY))


def test_what_no_module_runs_is_refused(llamas: tuple[peft.PeftModel, AdaptedModel]) -> None:
    base = llamas[1].base
    on_graph = peftfx.transform(copy.deepcopy(base), peftfx.LoRA(r=2), road="graph")
    with pytest.raises(PeftfxError, match="does not take this argument"):
        on_graph.generate(**prompt(), **GREEDY, output_hidden_states=True)
    with pytest.raises(PeftfxError, match="own modules run all of them"):
        on_graph.generate(**prompt(), **GREEDY, adapter_names=NAMES)
    with pytest.raises(PeftfxError, match="not a list of names"):
        llamas[1].generate(**prompt(), **GREEDY, adapter_names="b")
    with pytest.raises(PeftfxError, match="no adapter"):
        llamas[1].generate(**prompt(), **GREEDY, adapter_names=["b", "c", "b"])
