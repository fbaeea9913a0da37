"""A GGUF file as a base: what it holds, dequantised, is the model; the command line takes it for a directory."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
import transformers as hf
from torch import Tensor

import peftfx
from peftfx.bases.load import load_base
from peftfx.cli.main import app
from peftfx.errors import PeftfxError
from peftfx.files import is_gguf

LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
TOKENS = ["<pad>", "<s>", "</s>", *LETTERS, "ab", "cd"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""transformers' names in a layer, and llama.cpp's."""


def name_in_file(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries and keys in llama.cpp's order: halves of a head's rotation side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hf.LlamaForCausalLM]:
    """A file of a tiny LLaMA with tied words, in blocks of 8 bits, and the model that it stands for."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=len(TOKENS), tie_word_embeddings=True)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    model = hf.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *(1 for _ in TOKENS[3:])])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
            if weight.ndim == 1:
                writer.add_tensor(name_in_file(name), weight.numpy())
                continue
            packed = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            weight.copy_(torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))
            heads = {"attn_q": 4, "attn_k": 2}.get(name_in_file(name).split(".")[-2])
            ordered = weight if heads is None else interleaved(weight, heads)
            packed = gguf.quantize(ordered.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name_in_file(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


IDS = torch.tensor([[1, 5, 9, 30, 4], [1, 7, 7, 12, 3]])


def test_a_base_is_the_model_that_the_file_stands_for(
    written: tuple[Path, hf.LlamaForCausalLM], capsys: pytest.CaptureFixture[str]
) -> None:
    path, want = written
    got = load_base(path)
    assert "Converting" not in capsys.readouterr().err
    assert type(got) is hf.LlamaForCausalLM
    assert not got.training
    assert got.lm_head.weight is got.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, want(IDS).logits, rtol=1e-4, atol=1e-5)
    assert load_base(path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_command_line_exports_it_with_an_adapter_and_it_generates(
    written: tuple[Path, hf.LlamaForCausalLM], tmp_path: Path
) -> None:
    path, _ = written
    adapted = peftfx.transform(load_base(path), peftfx.LoRA(r=2, target="all-linear"), seed=0)
    with torch.no_grad():
        for p in adapted.adapters.parameters():
            p.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    words = ["export", "--base", path, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"]
    app([str(word) for word in words], standalone_mode=False)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    served = peftfx.runtime.load(tmp_path / "out")
    told = {"max_new_tokens": 6, "do_sample": False}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(served.generate(**inputs, **told), adapted.generate(**inputs, **told))
    assert served.tokenizer("abcd").input_ids[-2:] == [TOKENS.index("ab"), TOKENS.index("cd")]


def test_inspect_needs_no_weights(written: tuple[Path, object], capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = written
    app(["inspect", str(path), "--target", "attention.query", "--json"], standalone_mode=False)
    assert [site["path"] for site in json.loads(capsys.readouterr().out)] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]


def test_a_broken_file_and_a_missing_package_are_told(
    written: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = written
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:900])
    assert is_gguf(short)
    with pytest.raises(PeftfxError, match="cannot read this GGUF file"):
        load_base(short)
    monkeypatch.setattr("peftfx.bases.gguf.find_spec", lambda name: None)
    with pytest.raises(PeftfxError, match="not installed: gguf accelerate"):
        load_base(path)


def test_a_head_that_the_file_lacks_is_not_made_up(written: tuple[Path, object]) -> None:
    with pytest.raises(PeftfxError, match=r"lacks the weights of score\.weight"):
        load_base(written[0], task="text-classification")
