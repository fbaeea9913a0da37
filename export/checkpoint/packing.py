"""Round a merged weight, and pack it into the tensors that a file format holds for a quantised layer.

The format of bitsandbytes holds nf4. The format `pack-quantized` of compressed-tensors holds integers of 4 and 8 bits,
symmetric or not. https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py
(QuantState) https://github.com/vllm-project/compressed-tensors/tree/main/src/compressed_tensors/compressors
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftfx.adapters.deferred import Deferred
from peftfx.export_options.quantize import BITS, Scheme
from peftfx.quantisation.bitsandbytes4 import MARKS
from peftfx.quantisation.codes import TABLES
from peftfx.quantisation.rounding import Rounded, round_blocks, round_table

TABLE = "nf4"
_MARK = next(mark for mark in MARKS if mark.endswith(TABLE))
BITSANDBYTES, COMPRESSED = "bitsandbytes", "compressed-tensors"


@dataclass
class Packing:
    """The rounding and packing of one weight [out, in].

    Attributes:
        scheme: how it is rounded.
        dtype: the dtype of the scales, and of the dequantised weight.
        lost: the norm of the rounding error relative to the weight's norm, set when the weight has been rounded.
        fitted: the rounded blocks, if GPTQ has rounded the weight already.
        print: the rounded weight times a fixed vector, float64 [out]. It identifies the weight when it is read again.
    """

    scheme: Scheme
    dtype: torch.dtype
    lost: float = 0.0
    print: Tensor | None = field(default=None, repr=False)
    fitted: Rounded | None = field(default=None, repr=False)

    def tensors(self, weight: Deferred) -> dict[str, Deferred]:
        """Return the tensors that replace the weight in files, by suffix after the module's path. They are lazy.

        Args:
            weight: float32 [out, in]. The number of columns is a multiple of the block size.
        """
        rows, columns = weight.shape
        likes = self._table_like(rows, columns) if self.scheme.kind == TABLE else self._integers_like(rows, columns)
        make = self._table if self.scheme.kind == TABLE else self._integers
        made = Deferred.of(lambda: make(weight.value()), [like.to("meta") for like in likes.values()])
        return dict(zip(likes, made, strict=True))

    def _table_like(self, rows: int, columns: int) -> dict[str, Tensor]:
        count = rows * columns
        return {
            "weight": torch.empty(count // 2, 1, dtype=torch.uint8, device="meta"),
            "weight.absmax": torch.empty(count // self.scheme.block, device="meta"),
            "weight.quant_map": torch.empty(16, device="meta"),
            _MARK: self._state(rows, columns),
        }

    def _table(self, value: Tensor) -> list[Tensor]:
        codes, magnitudes = round_table(value, TABLE, self.scheme.block, search=self.scheme.search)
        table = torch.tensor(TABLES[TABLE])
        rounded = table[codes.int()].view(-1, self.scheme.block).mul_(magnitudes.unsqueeze(1)).view(value.shape)
        self._note(value, rounded)
        return [(codes[::2] << 4 | codes[1::2]).unsqueeze(1), magnitudes, table, self._state(*value.shape)]

    def _state(self, rows: int, columns: int) -> Tensor:
        dtype = str(self.dtype).removeprefix("torch.")
        said = {"quant_type": TABLE, "blocksize": self.scheme.block, "dtype": dtype, "shape": [rows, columns]}
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    def _integers_like(self, rows: int, columns: int) -> dict[str, Tensor]:
        bits, count = BITS[self.scheme.kind], columns // self.scheme.block
        found = {
            "weight_packed": torch.empty(rows, columns * bits // 32, dtype=torch.int32, device="meta"),
            "weight_scale": torch.empty(rows, count, dtype=self.dtype, device="meta"),
            "weight_shape": torch.empty(2, dtype=torch.int64, device="meta"),
        }
        if not self.scheme.symmetric:
            found["weight_zero_point"] = torch.empty(-(-rows * bits // 32), count, dtype=torch.int32, device="meta")
        return found

    def _integers(self, value: Tensor) -> list[Tensor]:
        scheme, bits = self.scheme, BITS[self.scheme.kind]
        # Kernels for these files expect scales above zero.
        options = {"symmetric": scheme.symmetric, "search": scheme.search, "signed": False}
        made = self.fitted or round_blocks(value, bits, scheme.block, **options)
        scales = made.scales.to(self.dtype)
        zeros = (1 << bits - 1) if made.zeros is None else made.zeros.float().unsqueeze(-1)
        rounded = (made.integers.float() - zeros) * scales.float().unsqueeze(-1)
        self._note(value, rounded.flatten(1))
        found = [words(made.integers.flatten(1), bits), scales, torch.tensor(value.shape)]
        return found if made.zeros is None else [*found, words(made.zeros.T.contiguous(), bits).T.contiguous()]

    def _note(self, value: Tensor, rounded: Tensor) -> None:
        self.lost = float((rounded - value).norm() / value.norm().clamp(min=torch.finfo(torch.float32).tiny))
        self.print = print_of(rounded)


def print_of(weight: Tensor) -> Tensor:
    """Multiply a weight [out, in] by a fixed vector of +1 and -1 in float64 [out]. It tells weights apart."""
    rng = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (weight.shape[1],), generator=rng).double() * 2 - 1
    return torch.cat([part.double() @ signs for part in weight.split(max(1, (1 << 20) // weight.shape[1]))])


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n] into int32 [..., ceil(n * bits / 32)], the first code in the lowest bits."""
    per = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per))
    if bits == 4:
        padded = padded[..., ::2] | padded[..., 1::2] << 4
    return padded.contiguous().view(torch.int32)


def quantisation_config(packings: Mapping[str, Packing], left: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Make the `quantization_config` of a model.

    Args:
        packings: how its linear layers are rounded, by their paths.
        left: the paths of the linear layers that are not rounded.
        dtype: the dtype that the model computes in.
    """
    schemes = list(dict.fromkeys(packing.scheme for packing in packings.values()))
    if schemes[0].kind == TABLE:
        return {
            "quant_method": BITSANDBYTES,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": TABLE,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(left),
        }
    groups = {}
    for number, scheme in enumerate(schemes):
        own = [path for path, packing in packings.items() if packing.scheme == scheme]
        weights = {
            "num_bits": BITS[scheme.kind],
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group",
            "group_size": scheme.block,
            "dynamic": False,
            "actorder": None,
        }
        targets = ["Linear"] if len(schemes) == 1 else own
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": COMPRESSED,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(left),
        "kv_cache_scheme": None,
    }
