"""bitsandbytes in 4 bits, as transformers saves it: nf4 and fp4, also with double quantisation.

https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py (QuantState)
"""

from __future__ import annotations

import functools
import json

import torch
from torch import Tensor

from peftfx.quantisation.codes import TABLES, Tabled
from peftfx.quantisation.packed import Packed

MARKS = tuple(f"weight.quant_state.bitsandbytes__{table}" for table in TABLES)
NAMES = frozenset(
    {
        *MARKS,
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    }
)


def read(packed: Packed) -> Tabled:
    """Return a layer's codes.

    Raises:
        PeftfxError: the codes' `quant_state` is broken, or does not fit the codes.
    """
    mark = next(name for name in MARKS if name in packed.tensors)
    try:
        said = json.loads(bytes(packed.get(mark, torch.uint8).tolist()))
        table, block = str(said["quant_type"]), int(said["blocksize"])
        rows, columns = map(int, said["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise packed.wrong(f"its quant_state lacks quant_type, blocksize or shape [out, in] ({error!r})") from error
    if table != mark.rpartition("__")[2] or block < 16 or block & block - 1 or min(rows, columns) < 1:
        raise packed.wrong(f"its quant_state makes no sense: {table}, blocks of {block}, [{rows}, {columns}]")
    weight, absmax = packed.get("weight"), packed.get("weight.absmax", torch.float32, torch.uint8)
    codes = weight.reshape(-1).view(torch.uint8)
    count, blocks = rows * columns, -(-rows * columns // block)
    if len(codes) != -(-count // 2) or absmax.shape != (blocks,):
        what = f"weight has {2 * len(codes)} numbers and absmax {block * len(absmax)}, but its shape has {count}"
        raise packed.wrong(what)
    if "weight.quant_map" in packed.tensors and not torch.allclose(
        packed.get("weight.quant_map").float(), torch.tensor(TABLES[table]), atol=1e-6
    ):
        raise packed.wrong(f"its quant_map is not that of {table}")
    magnitudes = absmax if absmax.dtype == torch.float32 else _nested(packed, absmax, said)
    read = functools.partial(_magnitudes, magnitudes)
    return Tabled(f"bitsandbytes {table}", rows, columns, table, block, lambda: codes, read)


_Nested = tuple[Tensor, Tensor, Tensor, int, float]


def _nested(packed: Packed, absmax: Tensor, said: dict[str, object]) -> _Nested:
    """Return the parts of quantised magnitudes: codes, their table, the magnitudes of their blocks, and an offset."""
    table = packed.get("weight.nested_quant_map", torch.float32)
    outer = packed.get("weight.nested_absmax", torch.float32)
    size, offset = said.get("nested_blocksize"), said.get("nested_offset")
    if not isinstance(size, int) or size < 1 or not isinstance(offset, int | float):
        raise packed.wrong("its quant_state lacks nested_blocksize or nested_offset")
    if table.shape != (256,) or outer.shape != (-(-len(absmax) // size),):
        raise packed.wrong(f"nested_absmax is {list(outer.shape)} for {len(absmax)} magnitudes in blocks of {size}")
    return absmax, table, outer, size, float(offset)


def _magnitudes(kept: Tensor | _Nested) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    absmax, table, outer, size, offset = kept
    return table.index_select(0, absmax.int()) * outer.repeat_interleave(size)[: len(absmax)] + offset
