"""Adapters of a base that got new tokens after it was loaded: their files have its embeddings, as in HF PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.adapted import randomise
from support.zoo import ZOO
from torch import nn

import peftfx
import peftfx.runtime
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.adapter_command import export_adapter_directories

IDS = torch.randint(96, 104, (2, 5), generator=torch.Generator().manual_seed(0))  # most are new


def resized(directory: Path, seed: int) -> nn.Module:
    """The base with 105 tokens, of which 6 have random rows."""
    torch.manual_seed(seed)
    base = hf.AutoModelForCausalLM.from_pretrained(directory).eval()
    base.resize_token_embeddings(105, mean_resizing=False)
    return base


@pytest.fixture(params=["llama", "gemma2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base of 99 tokens in a directory; the head of the second is tied."""
    ZOO[request.param].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [97, 100, 101]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [97, 100], "lm_head": [97, 100]}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},  # of tied ones, the head keeps the base's
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_rows_of_new_tokens_are_in_the_file(base: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """They were lost: loaded on the base that was resized again, the adapter ran over other rows."""
    ours = peftfx.transform(resized(base, 1), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    randomise(ours)
    ours.save_pretrained(tmp_path / "adapter")
    state, written = peftfx.get_peft_model_state_dict(ours), load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) for name in state)
    peftfx.set_peft_model_state_dict(ours, state)
    want = ours.eval()(input_ids=IDS).logits.detach()
    for load in (peftfx.load, peft.PeftModel.from_pretrained):
        read = load(resized(base, 2), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(read(input_ids=IDS).logits, want, rtol=0, atol=1e-5)
        if load is peftfx.load:
            read.save_pretrained(str(tmp_path / "again"))
            again = peftfx.load(resized(base, 3), tmp_path / "again").eval()
            torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [{"init_lora_weights": "olora"}, {"kasa_config": {}}], ids=["olora", "kasa"])
def test_a_head_is_saved_without_the_part_that_an_adapter_started_as(
    base: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """The part was taken out once more: HF PEFT's files have what is left of the weights of embeddings and heads."""

    def model(change: float) -> nn.Module:
        made = hf.AutoModelForCausalLM.from_pretrained(base).eval()
        made.lm_head.weight.data += change  # the file has its own
        return made

    more = {name: peft.KasaConfig() if name == "kasa_config" else value for name, value in options.items()}
    theirs = peft.get_peft_model(model(0), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **more))
    randomise(theirs)
    ids = IDS % 99
    want = theirs.eval()(input_ids=ids).logits.detach()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = peftfx.load(model(0.1), tmp_path / "theirs").eval()
    ours.save_pretrained(str(tmp_path / "ours"))
    again = peft.PeftModel.from_pretrained(model(0.2), str(tmp_path / "ours")).eval()
    for read in (ours, again, peftfx.load(model(0.2), tmp_path / "ours").eval(), ours.merge_and_unload()):
        torch.testing.assert_close(read(input_ids=ids).logits, want, rtol=0, atol=1e-4)


def test_a_head_that_an_adapter_started_from_is_not_saved_beside_it(base: Path, tmp_path: Path) -> None:
    ours = peftfx.transform(resized(base, 1), peftfx.LoRA(r=2, init_lora_weights="pissa", target_modules=["lm_head"]))
    with pytest.raises(PeftfxError, match="started as a part of the weight of lm_head"):
        ours.save_pretrained(tmp_path / "asked", save_embedding_layers=True)
    with pytest.warns(PeftfxWarning, match="Save the base itself, too"):
        ours.save_pretrained(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_magnitudes_that_peft_writes_twice(base: Path, tmp_path: Path) -> None:
    """With the embedding itself, under the name that they have in memory: the file was refused."""
    config = peft.LoraConfig(r=4, target_modules=["model.embed_tokens"], use_dora=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(resized(base, 1), config)
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.lora_magnitude_vector.weight" in names
    read = peftfx.load(resized(base, 2), tmp_path / "adapter").eval()
    want = theirs.eval()(input_ids=IDS).logits
    torch.testing.assert_close(read(input_ids=IDS).logits, want, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("road", ["modules", "graph"])
def test_two_adapters_of_one_resized_base_act_together(base: Path, road: str, tmp_path: Path) -> None:
    """Both files have the same rows of the base. They were refused, as if both trained them."""
    ours = peftfx.transform(resized(base, 1), peftfx.LoRA(r=2, target_modules=["q_proj", "lm_head"]))
    ours.add_adapter("other", peftfx.LoRA(r=2, target_modules=["v_proj"]))
    randomise(ours)
    ours.save_pretrained(tmp_path / "both")
    read = peftfx.load(resized(base, 2), tmp_path / "both", road=road)
    read.load_adapter(tmp_path / "both" / "other", "other")
    for adapted in (ours, read):
        adapted.set_adapter(["default", "other"])
    torch.testing.assert_close(read.eval()(input_ids=IDS).logits, ours.eval()(input_ids=IDS).logits, rtol=0, atol=1e-5)
    read.adapter("other").get("saved.lm_head.weight").data.add_(1.0)
    with pytest.raises(PeftfxError, match="both"):
        read.set_adapter(["default", "other"])


def test_what_is_written_and_what_is_told(base: Path, tmp_path: Path) -> None:
    rule = peftfx.LoRA(r=2, target_modules=["q_proj"])
    new, plain = peftfx.transform(resized(base, 1), rule), hf.AutoModelForCausalLM.from_pretrained(base)
    with pytest.warns(PeftfxWarning, match="was resized from 99 tokens after loading"):
        new.save_pretrained(tmp_path / "new")
    plain, table = peftfx.transform(plain, rule), "base_model.model.model.embed_tokens.weight"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.save_pretrained(tmp_path / "without", save_embedding_layers=False)
        plain.save_pretrained(tmp_path / "plain")
        plain.save_pretrained(tmp_path / "asked", save_embedding_layers=True)
    files = {path.name: load_file(path / "adapter_model.safetensors") for path in tmp_path.iterdir() if path != base}
    assert {name for name, tensors in files.items() if table in tensors} == {"new", "asked"}
    ours = peftfx.transform(resized(base, 1), peftfx.PromptTuning(num_virtual_tokens=2))
    with pytest.warns(PeftfxWarning, match=r"cannot have the base's embeddings(.|\n)*Save the base(.|\n)*itself, too"):
        ours.save_pretrained(tmp_path / "prompt")
    with pytest.raises(PeftfxError, match="cannot have the base's embeddings"):
        ours.save_pretrained(tmp_path / "prompt", save_embedding_layers=True)


ROWS = (
    peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[97, 100, 101], task_type="CAUSAL_LM"),
    peft.TrainableTokensConfig(token_indices=[97, 100, 101], task_type="CAUSAL_LM"),
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("road", ["modules", pytest.param("graph", marks=pytest.mark.further)])
@pytest.mark.parametrize("config", ROWS, ids=lambda config: config.peft_type.value)
def test_trained_rows_are_put_into_the_embedding_of_the_file(
    config: peft.PeftConfig, road: Any, base: Path, tmp_path: Path
) -> None:
    """Rows of new tokens that are not trained are those of the file, as in `peft`: in calls, steps and merges."""
    theirs = peft.get_peft_model(resized(base, 1), copy.deepcopy(config))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(resized(base, 2), tmp_path / "adapter", is_trainable=True)
    ours = peftfx.load(resized(base, 2), tmp_path / "adapter", is_trainable=True, road=road)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    want = theirs.eval()(input_ids=IDS).logits.detach()
    torch.testing.assert_close(ours.eval()(input_ids=IDS).logits, want, rtol=0, atol=1e-5)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(str(tmp_path / name))
    found, files = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert all(torch.allclose(found[name], files[name], atol=1e-5) for name in found.keys() & files)
    again = peft.PeftModel.from_pretrained(resized(base, 2), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=0, atol=1e-5)
    if road == "graph":
        ours.export(tmp_path / "out", view="forward", merge=False)
        got = peftfx.runtime.load(tmp_path / "out")(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    ours.merge()
    torch.testing.assert_close(ours.remove()(input_ids=IDS).logits, want, rtol=0, atol=1e-5)


@pytest.mark.further
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_that_only_modules_without_a_copy_read(tmp_path: Path) -> None:
    """T5's encoder and decoder read the base's rows by modules of their own: they were in no file, and read of none."""
    ZOO["t5"].build().save_pretrained(tmp_path / "base")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}

    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(105, mean_resizing=False)
        return model

    config = peft.LoraConfig(r=4, target_modules=["q"], modules_to_save=["shared", "lm_head"], task_type="SEQ_2_SEQ_LM")
    for adapt, name in ((peftfx.transform, "ours"), (peft.get_peft_model, "theirs")):
        adapted = adapt(base(1), config)
        randomise(adapted)
        adapted.save_pretrained(str(tmp_path / name))
        want = adapted.eval()(**inputs).logits.detach()
        for load in (peftfx.load, peft.PeftModel.from_pretrained):
            read = load(base(2), str(tmp_path / name)).eval()
            torch.testing.assert_close(read(**inputs).logits, want, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_are_trained_where_the_tied_head_has_its_own_copy(tmp_path: Path) -> None:
    """HF PEFT refuses this config at the head that it has wrapped; the file is read by what wrote it."""
    ZOO["gemma2"].build().save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [97, 100]}}
    ours = peftfx.transform(resized(tmp_path / "base", 1), peftfx.LoRA(r=2, target_modules=["q_proj"], **options))
    randomise(ours)
    ours.save_pretrained(tmp_path / "adapter")
    again = peftfx.load(resized(tmp_path / "base", 2), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(input_ids=IDS).logits, ours.eval()(input_ids=IDS).logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_base_without_the_tokens_of_a_file_is_named(base: Path, tmp_path: Path) -> None:
    """Files, hot swaps and graphs with slots: the messages told of places, shapes or another base alone."""
    rule, plain = peftfx.LoRA(r=2, target_modules=["q_proj"]), hf.AutoModelForCausalLM.from_pretrained(base)
    peftfx.transform(resized(base, 1), rule).save_pretrained(tmp_path / "new")
    peftfx.export_onnx(plain, tmp_path / "graph", slots="attention.query", view="forward", source=base)
    ours, other = peftfx.transform(plain, rule), peftfx.transform(resized(base, 2), rule)
    with pytest.raises(PeftfxError) as error:
        peftfx.hotswap_adapter(ours, tmp_path / "new")
    assert "have 105 tokens, and the base's have 99: resize the base" in error.value.hint
    with pytest.raises(PeftfxError, match=r"its own values of lm_head.weight.*, and the loaded one has not"):
        peftfx.hotswap_adapter(other, tmp_path / "new")
    other.load_adapter(tmp_path / "new", "new")
    other.set_adapter("new")
    with pytest.raises(PeftfxError, match="that has 99 tokens, and the base here has 105"):
        peftfx.export_adapter(other, tmp_path / "graph", tmp_path / "x")
    with pytest.raises(PeftfxError, match="that has 99 tokens, and the base here has 105"):
        export_adapter_directories([str(tmp_path / "new")], tmp_path / "graph", tmp_path / "x")


def test_a_folder_without_a_config_tells_no_number_of_tokens(tmp_path: Path) -> None:
    """transformers reads a config of defaults there, of other tokens: the adapter's file had the embeddings."""
    model = ZOO["llama"].build()
    model.config.name_or_path = str(tmp_path)
    ours = peftfx.transform(model, peftfx.LoRA(r=2))
    assert not [name for name in peftfx.get_peft_model_state_dict(ours) if "embed_tokens" in name]
