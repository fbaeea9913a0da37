"""aLoRA: an adapter acts from its invocation in the text on, as in HF PEFT; ahead of it all is the base's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.adapted import randomise
from torch import Tensor, nn

import peftfx
from peftfx import runtime
from peftfx.errors import PeftfxError
from peftfx.generation.invocation import offsets_of
from peftfx.model.adapted import AdaptedModel
from peftfx.rules.peft_files import CONFIG, WEIGHTS
from peftfx.testing.parity import same_gradients

TOKENS = [5, 9]
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
OPTIONS = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "alora_invocation_tokens": TOKENS}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, num_hidden_layers=2, **SIZE)).eval()


def text() -> Tensor:
    """Invoked in the middle, twice, at the very end, not at all, and half."""
    ids = torch.randint(10, 64, (5, 9), generator=torch.Generator().manual_seed(1))
    for row, at in ((0, 3), (1, 1), (1, 6), (2, 7)):
        ids[row, at : at + 2] = torch.tensor(TOKENS)
    ids[4, 8] = TOKENS[0]
    return ids


IDS = text()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    made = peft.get_peft_model(llama(), peft.LoraConfig(**OPTIONS, task_type="CAUSAL_LM")).eval()
    randomise(made)
    made.save_pretrained(str(directory := tmp_path_factory.mktemp("alora")))
    return made, directory


@pytest.fixture(scope="module")
def ours(theirs: tuple[nn.Module, Path]) -> AdaptedModel:
    return peftfx.load(llama(), theirs[1])


def test_where_a_row_is_invoked_is_the_last_place() -> None:
    assert offsets_of(IDS, TOKENS).tolist() == [6, 3, 2, 0, 0]
    assert offsets_of(IDS[:, :1], TOKENS).tolist() == [0] * 5


@pytest.mark.parametrize("road", ["modules", pytest.param("graph", marks=pytest.mark.slow)])
def test_outputs_gradients_and_files_are_pefts(
    road: str, theirs: tuple[nn.Module, Path], ours: AdaptedModel, tmp_path: Path
) -> None:
    other, directory = theirs
    ours = ours if road == "modules" else peftfx.load(llama(), directory, road="graph")
    got, plain = ours(input_ids=IDS).logits, llama()(IDS).logits
    torch.testing.assert_close(got, other(input_ids=IDS).logits)
    apart = (got - plain).abs().amax(-1) > 1e-3
    assert apart.sum(1).tolist() == [6, 3, 2, 0, 0]
    assert not apart[0, :3].any()
    for model in (ours.train(), other.train()):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
    same_gradients(ours.eval().adapter("default"), other.eval())
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(load_file(tmp_path / WEIGHTS), load_file(directory / WEIGHTS))
    assert json.loads((tmp_path / CONFIG).read_text())["alora_invocation_tokens"] == TOKENS


@torch.no_grad()
def test_it_generates_as_peft_does_and_goes_on_from_the_bases_cache(
    theirs: tuple[nn.Module, Path], ours: AdaptedModel
) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(ours.generate(IDS, **options), theirs[0].generate(input_ids=IDS, **options))
    cache = llama()(IDS[:1, :3], use_cache=True).past_key_values  # what the base has made of the text ahead
    rest = ours(input_ids=IDS[:1, 3:], past_key_values=cache, attention_mask=torch.ones(1, 9, dtype=torch.long))
    torch.testing.assert_close(rest.logits, ours(input_ids=IDS[:1]).logits[:, 3:])
    step = ours(input_ids=IDS[:1, :1], past_key_values=rest.past_key_values, alora_offsets=[7])
    whole = torch.cat([IDS[:1], IDS[:1, :1]], 1)
    torch.testing.assert_close(step.logits, ours(input_ids=whole).logits[:, -1:])


@pytest.mark.filterwarnings("ignore")
def test_exported_it_finds_the_invocation_and_is_told_it_in_later_steps(ours: AdaptedModel, tmp_path: Path) -> None:
    report = ours.export(tmp_path / "out", view="decode")
    assert not report.merged
    served = runtime.load(tmp_path / "out")
    assert "alora_offsets" in served.model.inputs
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(served.generate(IDS, **options), ours.generate(IDS, **options))
    assert not (tmp_path / "out" / "genai_config.json").exists()  # that runtime would never tell it


@pytest.mark.slow
def test_a_forward_is_exported(ours: AdaptedModel, tmp_path: Path) -> None:
    ours.export(tmp_path / "out", view="forward")
    got = peftfx.export.OnnxModel(tmp_path / "out")(input_ids=IDS, attention_mask=torch.ones_like(IDS))["logits"]
    torch.testing.assert_close(got, ours(input_ids=IDS).logits.detach(), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused(ours: AdaptedModel) -> None:
    for merge in (ours.merge, ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(PeftfxError, match="no weight does that"):
            merge()
    with pytest.raises(PeftfxError, match="no input_ids reach"):
        ours(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(PeftfxError, match="in the text of all rows"):
        ours(input_ids=IDS, adapter_names=["default"] * 5)
    with pytest.raises(PeftfxError, match="for each of 5 rows"):
        ours(input_ids=IDS, alora_offsets=[1])
    for options, what in (
        ({"alora_invocation_tokens": []}, "one token or more"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "variants of LoRA of which a rule has one"),
        ({"alora_invocation_tokens": [1], "init_lora_weights": "pissa"}, "is no start of a variant"),
    ):
        with pytest.raises(PeftfxError, match=what):
            peftfx.LoRA(**options)
    with pytest.raises(PeftfxError, match="at linear layers, not at a embedding"):
        copy.deepcopy(ours).add_adapter("x", peftfx.LoRA(target="embedding.token", alora_invocation_tokens=[1]))
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(PeftfxError, match="has no such text"):
        peftfx.transform(net, peftfx.LoRA(alora_invocation_tokens=[1]), inputs={"input": torch.zeros(2, 8)})
