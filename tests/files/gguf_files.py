"""A tiny LLaMA as llama.cpp has it: a GGUF file, and the model that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf
from torch import Tensor

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


def in_halves(weight: Tensor, heads: int) -> Tensor:
    """Back from llama.cpp's order."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def packed_as(kind: gguf.GGMLQuantizationType, weight: Tensor) -> np.ndarray:
    """A weight in blocks; of types that the package cannot quantise to, random bytes with scales that are not large."""
    try:
        return gguf.quantize(weight.contiguous().numpy(), kind)
    except NotImplementedError:
        columns, size = gguf.GGML_QUANT_SIZES[kind]
        random = np.random.default_rng(weight.numel())
        raw = random.integers(0, 256, (len(weight), weight.shape[1] // columns, size), dtype=np.uint8)
        for at in (size - 2,) if kind.name == "Q6_K" else (0, 2):
            halves = (1e-4 + 1e-4 * random.random(raw.shape[:2])).astype(np.float16)
            raw[..., at : at + 2] = halves[..., None].view(np.uint8)
        return raw.reshape(len(weight), -1)


def write(path: Path, kind: Callable[[str], str] = lambda name: "Q8_0", **fields: int) -> hf.LlamaForCausalLM:
    """Write a file of a tiny LLaMA with tied words; the model that it stands for.

    Args:
        path: of the file.
        kind: the type of the blocks of a weight, by its name in the file.
        fields: of the config, that are not `SIZES`.
    """
    torch.manual_seed(0)
    sizes = {**SIZES, **fields}
    config = hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(TOKENS), tie_word_embeddings=True)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    model = hf.LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(2)
    writer.add_feed_forward_length(config.intermediate_size)
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
            own = gguf.GGMLQuantizationType[kind(name_in_file(name))]
            heads = {"attn_q": 4, "attn_k": 2}.get(name_in_file(name).split(".")[-2])
            packed = packed_as(own, weight if heads is None else interleaved(weight, heads))
            found = torch.from_numpy(gguf.dequantize(packed, own))
            weight.copy_(found if heads is None else in_halves(found, heads))
            writer.add_tensor(name_in_file(name), packed, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
