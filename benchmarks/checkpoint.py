"""A random LLaMA (or Mixtral) on disk, of any size, and a LoRA for it: what the other benchmarks work on.

    python benchmarks/checkpoint.py /tmp/7b --layers 32 --hidden 4096 --intermediate 11008 --dtype bf16

Writes `base/` (config and sharded safetensors, as transformers does) and `adapter/` (as HF PEFT does, on all linear
layers but the head). Tensors are made and written one at a time, so that the size of the model is the disk's affair.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

DTYPES = {"fp32": (torch.float32, "F32"), "fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16")}


@dataclass(frozen=True)
class Size:
    """Of a LLaMA, or of a Mixtral if there are experts; the defaults are the 1.1B of the tables."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000
    experts: int = 0

    def config(self, dtype: str = "fp32") -> dict[str, object]:
        """As in `config.json`."""
        kind, name = ("mixtral", "Mixtral") if self.experts else ("llama", "Llama")
        experts = {"num_local_experts": self.experts, "num_experts_per_tok": 2} if self.experts else {}
        return {
            "model_type": kind,
            "architectures": [f"{name}ForCausalLM"],
            **experts,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": str(DTYPES[dtype][0]).removeprefix("torch."),
        }


def write_checkpoint(directory: Path, size: Size, dtype: str = "fp32", shard: int = 2 << 30, rank: int = 8) -> None:
    """Write `directory/base` and `directory/adapter`.

    Args:
        directory: where to; must not have them yet.
        size: of the model.
        dtype: of the base's weights; the adapter's are float32.
        shard: the most bytes in a file of the base.
        rank: of the LoRA; its `lora_alpha` is twice that.
    """
    base, adapter = directory / "base", directory / "adapter"
    for made in (base, adapter):
        made.mkdir(parents=True)
    model = _blank(size.config(dtype))
    _write_json(base / "config.json", size.config(dtype))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    _write_shards(base, shapes, dtype, shard)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    _write_adapter(adapter, linears, rank)


def _blank(config: Mapping[str, object]) -> nn.Module:
    """The model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config["model_type"]), **options))


def _write_shards(directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, limit: int) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    width, filled = DTYPES[dtype][0].itemsize, 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * width
        if shards[-1] and filled + nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, contents in zip(names, shards, strict=True):
        _write_safetensors(directory / name, contents, dtype, _base_value)
    where = {tensor: name for name, contents in zip(names, shards, strict=True) for tensor in contents}
    total = sum(math.prod(shape) for shape in shapes.values()) * width
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_adapter(directory: Path, linears: Mapping[str, nn.Module], rank: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in linears.items():
        out, into = module.weight.shape  # type: ignore[misc]
        shapes[f"base_model.model.{path}.lora_A.weight"] = (rank, int(into))
        shapes[f"base_model.model.{path}.lora_B.weight"] = (int(out), rank)
    _write_safetensors(directory / "adapter_model.safetensors", shapes, "fp32", _adapter_value)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in linears}),
    }
    _write_json(directory / "adapter_config.json", config)


def _base_value(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Matrices that keep the size of what goes through them; scales about 1."""
    if len(shape) == 1:
        return torch.empty(shape).uniform_(0.5, 1.5, generator=rng)
    bound = math.sqrt(3 / shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=rng)


def _adapter_value(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """An update about a tenth of the base's weights: trained ones are smaller, and would hide errors."""
    bound = math.sqrt(3 / shape[1]) * (1.0 if ".lora_A." in name else 0.05)
    return torch.empty(shape).uniform_(-bound, bound, generator=rng)


def _write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    value: Callable[[str, tuple[int, ...], torch.Generator], Tensor],
) -> None:
    """The format by hand: a length, a header in JSON, the tensors. Its own library wants all of them in memory."""
    kind, code = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            file.write(value(name, shape, rng).to(kind).view(torch.uint8).numpy())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def add_size_options(parser: argparse.ArgumentParser, usual: Size | None = None) -> None:
    """`--layers`, `--hidden` and the other fields of a Size."""
    for name, default in vars(usual or Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def size_of(args: argparse.Namespace) -> Size:
    """The Size that the options say."""
    return Size(**{name: getattr(args, name) for name in vars(Size())})


def main(words: Sequence[str] | None = None) -> None:
    """Write the two directories and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--shard", type=int, default=2 << 30, help="the most bytes in a file")
    parser.add_argument("--rank", type=int, default=8)
    add_size_options(parser)
    args = parser.parse_args(words)
    write_checkpoint(args.directory, size_of(args), args.dtype, args.shard, args.rank)
    for name in ("base", "adapter"):
        files = sorted((args.directory / name).glob("*.safetensors"))
        print(f"{name}: {sum(f.stat().st_size for f in files):,} bytes in {len(files)} files", file=sys.stderr)


if __name__ == "__main__":
    main()
