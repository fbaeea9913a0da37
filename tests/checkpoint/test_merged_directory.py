"""A merged directory is what HF PEFT writes of a float base, and of a quantised one had it left the codes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file
from support import quantised as q
from support.command import Result, assert_refused
from support.mixtures import MIXTURES, mixture
from support.zoo import ZOO
from torch import Tensor

import peftfx as px
from peftfx.errors import PeftfxError
from peftfx.export.merge_command import merge_directory

IDS = torch.tensor([[1, 5, 9, 30, 4, 77, 8], [1, 7, 7, 12, 3, 0, 2]])
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def written(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def adapted(model: torch.nn.Module, directory: Path, **options: object) -> peft.PeftModel:
    """Under a random adapter, which is in a directory too."""
    fields = {"r": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(1)
    made = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
    made.save_pretrained(directory)
    return made


def same(got: dict[str, Tensor], want: dict[str, Tensor], near: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=near, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_it_is_what_peft_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = q.tiny(num_hidden_layers=1).to(dtype)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    made = adapted(model, tmp_path / "adapter")
    report = merge_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", max_shard_size=40_000)
    made.merge_and_unload().save_pretrained(tmp_path / "peft")
    same(written(tmp_path / "out"), written(tmp_path / "peft"), 1e-6 if dtype == torch.float32 else 2e-3)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert len(report.merged) == 2
    assert bool(report.rounding) == (dtype == torch.bfloat16)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "peft" / "config.json").read_text()
    )


def test_a_quantised_base_is_written_in_floating_point(tmp_path: Path) -> None:
    model = q.tiny(num_hidden_layers=1)
    q.write(tmp_path / "base", model, BNB, q.table4(double=True))
    made = adapted(model, tmp_path / "adapter")
    merge_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    made.merge_and_unload().save_pretrained(tmp_path / "peft")
    same(written(tmp_path / "out"), written(tmp_path / "peft"))


def test_a_head_that_is_tied_to_the_words_becomes_two(tmp_path: Path) -> None:
    model = q.tiny(tie_word_embeddings=True, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    made = adapted(model, tmp_path / "adapter", target_modules=["lm_head"])
    with torch.no_grad():
        want = made(IDS).logits
    report = merge_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    assert report.untied == ["lm_head.weight"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits, want)
    assert loaded.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)
    merge_directory(tmp_path / "base", tmp_path / "same")
    assert "lm_head.weight" not in written(tmp_path / "same")


def _masked() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=128, **sizes))


def _two_stacks() -> hf.PreTrainedModel:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=128, d_model=32, **layers, **heads))


TIED = {
    "bias of the head": (_masked, ["query", "decoder"]),
    "words": (_masked, ["query", "word_embeddings"]),
    "head of two stacks": (_two_stacks, ["q_proj", "lm_head"]),
    "words of one stack": (_two_stacks, ["decoder.embed_tokens"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TIED)
def test_what_else_is_tied_is_there_when_the_merged_model_is_loaded_again(name: str, tmp_path: Path) -> None:
    build, targets = TIED[name]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    made, cls = adapted(model, tmp_path / "adapter", target_modules=targets), type(model)
    with torch.no_grad():
        want = made(input_ids=IDS).logits
    merged = px.load(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "live")
    merge_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    for again in (merged, *(cls.from_pretrained(tmp_path / which).eval() for which in ("live", "out"))):
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_taken_apart_as_in_the_files_that_they_came_from(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    model.save_pretrained(tmp_path / "base")
    rule = px.LoRA(r=2, target="experts.up | attention.output")
    trained = randomised(px.transform(model, rule))
    trained.save_pretrained(tmp_path / "adapter")
    merge_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    trained.merge()
    trained.remove().save_pretrained(tmp_path / "whole")
    same(written(tmp_path / "out"), written(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.custom is None])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    model = ZOO[name].build()
    model.save_pretrained(tmp_path / "base")
    trained = randomised(px.transform(model, px.LoRA(r=2, target="all-linear")))
    trained.save_pretrained(tmp_path / "adapter")
    merge_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=ZOO[name].task)
    trained.merge()
    trained.remove().save_pretrained(tmp_path / "whole")
    same(written(tmp_path / "out"), written(tmp_path / "whole"))


def randomised(model: px.AdaptedModel) -> px.AdaptedModel:
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return model.eval()


def test_the_command_line_takes_it_and_writes_nothing_half(tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    done = peftfx("merge", "--base", base, "--output", out, "--dtype", "fp16")
    assert done.code == 0, done.err
    assert "float16" in done.out
    assert_refused(peftfx("merge", "--base", base, "--output", out), "exists already")
    assert_refused(peftfx("merge", "--base", base, "--output", tmp_path / "b", "--max-shard-size", "big"), "not a size")
    model = ZOO["llama"].build()
    peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "prompt"
    )
    with pytest.raises(PeftfxError, match="a soft prompt has no place"):
        merge_directory(base, tmp_path / "c", adapter=tmp_path / "prompt")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out", "prompt"}


def test_a_bias_that_the_config_has_no_place_for_is_refused(tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    model = q.tiny(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "adapter", lora_bias=True)
    words = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out")
    assert_refused(
        peftfx("merge", *words), "the module has no bias, and the merged weight needs one", "lora_bias=False"
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_holds_nan_is_named_and_not_the_weight_that_it_is_folded_into(tmp_path: Path) -> None:
    model = q.tiny(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    made = adapted(model, tmp_path / "adapter")
    with torch.no_grad():
        made.get_submodule("base_model.model.model.layers.0.mlp.down_proj.lora_B.default").weight[1, 0] = torch.nan
    made.save_pretrained(tmp_path / "adapter")
    with pytest.raises(PeftfxError, match=r"the adapter 'default' holds NaN .*\[model.layers.0.mlp.down_proj.lora_B\]"):
        merge_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()
