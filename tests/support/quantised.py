"""Quantised layers written by the definitions of their formats, and the matrices that they stand for, in numpy.

Nothing of them is of the package: codes and scales are random, the matrix is computed from them in the definition's own
words, and the packing is written as the format's own packer has it, word by word.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from peftfx.export.coded.rounded import halves
from peftfx.quantisation.rounding import round_blocks

Layer = tuple[dict[str, Tensor], Tensor]
"""What a file has for a layer, by the names after its path, and its float32 weight [out, in]."""
Pack = Callable[[np.random.Generator, int, int], Layer]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def tiny(seed: int = 0, **fields: object) -> hf.LlamaForCausalLM:
    """A LLaMA of two layers, float32."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "vocab_size": 100, **fields})
    return hf.LlamaForCausalLM(config).eval()


def write(directory: Path, model: hf.PreTrainedModel, said: dict[str, object], pack: Pack, metadata: str = "") -> None:
    """Write a base whose linear layers but the head are quantised; the model gets the weights they stand for.

    The metadata is of each layer.
    """
    random = np.random.default_rng(0)
    tensors = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            own, weight = pack(random, module.out_features, module.in_features)
            module.weight.data.copy_(weight)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in own.items()}
    directory.mkdir(parents=True, exist_ok=True)
    told = {f"{path}.weight": metadata for path, _ in model.named_modules()} if metadata else None
    save_file(tensors, directory / "model.safetensors", told)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": said}
    (directory / "config.json").write_text(json.dumps(config))


def scales(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Of float16, as most files have them."""
    return (0.01 + 0.02 * random.random(shape)).astype(np.float16).astype(np.float32)


def words(codes: NDArray[np.int64], bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [n * 32 / bits, m] packed along the first axis into int32 [n, m]."""
    if order is not None:
        codes = codes.reshape(-1, len(order), codes.shape[1])[:, list(order)].reshape(codes.shape)
    packed = np.zeros((len(codes) * bits // 32, codes.shape[1]), np.uint32)
    for number, row in enumerate(codes):
        for bit in range(bits):  # codes are side by side, and may go on in the next word
            at = number * bits + bit
            packed[at // 32] |= (row >> bit & 1).astype(np.uint32) << np.uint32(at % 32)
    return torch.from_numpy(packed.view(np.int32).copy())


def gptq(bits: int = 4, group: int = 32, *, symmetric: bool = True, act: bool = False, top: bool = False) -> Pack:
    """`top` has zeros of 2^bits, which the file holds as one less."""

    def pack(random: np.random.Generator, rows: int, columns: int) -> Layer:
        size = columns if group == -1 else group
        q = random.integers(0, 1 << bits, (columns, rows))
        scale = scales(random, columns // size, rows) / np.float32(1 << bits - 1)
        zero = np.full(scale.shape, 1 << bits - 1) if symmetric else random.integers(1, 1 << bits, scale.shape)
        if top:
            zero[0, :3] = 1 << bits
        groups = np.arange(columns) // size
        groups = random.permutation(groups) if act else groups
        weight = np.array([(q[i] - zero[g]).astype(np.float32) * scale[g] for i, g in enumerate(groups)]).T
        own = {
            "qweight": words(q, bits),
            "qzeros": words((zero - 1).T, bits).T,
            "scales": torch.from_numpy(scale).half(),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        return own, torch.from_numpy(weight.copy())

    return pack


def awq(group: int = 32) -> Pack:
    def pack(random: np.random.Generator, rows: int, columns: int) -> Layer:
        q, scale = random.integers(0, 16, (columns, rows)), scales(random, columns // group, rows)
        zero = random.integers(0, 16, scale.shape)
        weight = np.array([(q[i] - zero[i // group]).astype(np.float32) * scale[i // group] for i in range(columns)]).T
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        own = {
            "qweight": words(q.T, 4, order).T,
            "qzeros": words(zero.T, 4, order).T,
            "scales": torch.from_numpy(scale).half(),
        }
        return own, torch.from_numpy(weight.copy())

    return pack


def compressed(bits: int = 4, group: int = 32, *, symmetric: bool = True) -> Pack:
    def pack(random: np.random.Generator, rows: int, columns: int) -> Layer:
        half = 1 << bits - 1
        q = random.integers(-half, half, (rows, columns))
        scale = scales(random, rows, columns // group) / np.float32(1 << bits - 1)
        zero = np.zeros(scale.shape, np.int64) if symmetric else random.integers(-half, half, scale.shape)
        weight = (q - zero.repeat(group, 1)).astype(np.float32) * scale.repeat(group, 1)
        own = {
            "weight_packed": words(q.T + half, bits).T,
            "weight_scale": torch.from_numpy(scale).half(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            own["weight_zero_point"] = words(zero + half, bits)
        return own, torch.from_numpy(weight)

    return pack


def int8(name: str = "SCB") -> Pack:
    """bitsandbytes', or compressed-tensors' (`weight_scale`)."""

    def pack(random: np.random.Generator, rows: int, columns: int) -> Layer:
        q = random.integers(-127, 128, (rows, columns))
        largest = random.random((rows, 1)).astype(np.float32) + 1
        scale = torch.from_numpy(largest * np.float32(1 / 127 if name == "SCB" else 0.01))
        own = {"weight": torch.from_numpy(q.astype(np.int8))}
        kept = torch.from_numpy(largest)[:, 0] if name == "SCB" else scale
        return {**own, name: kept}, torch.from_numpy(q.astype(np.float32)) * scale

    return pack


def torchao(bits: int = 8, group: int = 0, *, symmetric: bool = True) -> Pack:
    def pack(random: np.random.Generator, rows: int, columns: int) -> Layer:
        half, size = 1 << bits - 1, group or columns
        q = random.integers(-half, half, (rows, columns))
        scale = scales(random, rows, columns // size)
        zero = np.zeros(scale.shape, np.int64) if symmetric else random.integers(-half, half, scale.shape)
        weight = (q - zero.repeat(size, 1)).astype(np.float32) * scale.repeat(size, 1)
        own = {
            "_weight_qdata": torch.from_numpy(q.astype(np.int8)),
            "_weight_scale": torch.from_numpy(scale),
            "_weight_zero_point": torch.from_numpy(zero.astype(np.int8)),
        }
        return own, torch.from_numpy(weight)

    return pack


def torchao_layer(kind: str, dtype: str = "int8") -> str:
    """What a file's metadata says of a layer."""
    target = {"_type": "torch.dtype", "_data": dtype}
    return json.dumps({"_type": kind, "_data": {"target_dtype": target, "block_size": [1, 32]}})


def fp8(block: tuple[int, int] | None = None, name: str = "weight_scale_inv", *, by_row: bool = False) -> Pack:
    def pack(random: np.random.Generator, rows: int, columns: int) -> Layer:
        values = torch.from_numpy(random.normal(size=(rows, columns)).astype(np.float32)).to(torch.float8_e4m3fn)
        height, width = block or ((1, columns) if by_row else (rows, columns))
        shape = (-(-rows // height), -(-columns // width))
        scale = torch.from_numpy(0.01 + 0.05 * random.random(shape).astype(np.float32))
        wide = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        kept = scale if block or by_row else scale.reshape(1)
        return {"weight": values, name: kept}, values.float() * wide

    return pack


def table4(table: str = NF4, kind: str = "nf4", block: int = 64, *, double: bool = False) -> Pack:
    """bitsandbytes' 4 bits, with magnitudes in float32 or quantised themselves."""

    def pack(random: np.random.Generator, rows: int, columns: int) -> Layer:
        numbers = np.array(table.split(), np.float32)
        q = random.integers(0, 16, rows * columns + rows * columns % 2)
        blocks = -(-rows * columns // block)
        said = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [rows, columns]}
        own: dict[str, Tensor] = {}
        if double:
            code, inner = np.linspace(-1, 1, 256).astype(np.float32), random.integers(0, 256, blocks)
            outer = 0.02 * random.random(-(-blocks // 256)).astype(np.float32)
            offset = np.float32(0.05)
            largest = np.array([code[c] * outer[i // 256] + offset for i, c in enumerate(inner)], np.float32)
            said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
            own["weight.nested_absmax"], own["weight.nested_quant_map"] = map(torch.from_numpy, (outer, code))
            own["weight.absmax"] = torch.from_numpy(inner.astype(np.uint8))
        else:
            largest = 0.1 * random.random(blocks).astype(np.float32)
            own["weight.absmax"] = torch.from_numpy(largest)
        flat = [numbers[q[i]] * largest[i // block] for i in range(rows * columns)]
        own |= {
            "weight": torch.from_numpy((q[::2] << 4 | q[1::2]).astype(np.uint8)).view(-1, 1),
            "weight.quant_map": torch.from_numpy(numbers),
            f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(
                list(json.dumps(said).encode()), dtype=torch.uint8
            ),
        }
        return own, torch.from_numpy(np.array(flat, np.float32).reshape(rows, columns))

    return pack


BLOCK = 32


def pack(weight: Tensor, bits: int, block: int, **options: bool) -> tuple[Tensor, Tensor]:
    """Blocks [out, blocks, bytes] and scales [out, blocks] of a weight [out, in]."""
    made = round_blocks(weight, bits, block, **options)
    return halves(made.integers, bits), made.scales


def unpack(blocks: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """The weight [out, in] that blocks and scales stand for."""
    if bits == 4:
        blocks = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = (blocks.to(scales.dtype) - (1 << bits - 1)) * scales.unsqueeze(-1)
    return values.flatten(1)[:, :columns]
