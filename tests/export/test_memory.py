"""An export holds a few tensors, never the model: a bound on its anonymous memory."""

from __future__ import annotations

import sys
from pathlib import Path

import contenders
import pytest
from checkpoint import Size, write_checkpoint
from measure import measured

TINY = Size(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=300)
SIZE = Size(layers=9, hidden=1024, intermediate=4096, heads=8, kv_heads=8, vocabulary=2000)
LARGEST = 4 * SIZE.hidden * SIZE.intermediate  #: bytes of the largest weight in float32
RUNTIME = 100 << 20  #: activations, the adapter, a graph of more layers
WRITTEN = {"fp32": 590e6, "bf16": 590e6, "fp16": 295e6}


def peak(directory: Path, size: Size, dtype: str) -> int:
    """Of anonymous memory, in an export of a random model of this size."""
    write_checkpoint(directory, size, dtype, shard=100 << 20)
    words = [directory / part for part in ("base", "adapter", "out")]
    return measured([sys.executable, contenders.__file__, "peftfx", *map(str, words)]).anonymous


@pytest.mark.slow
@pytest.mark.parametrize("dtype", WRITTEN)
def test_an_export_takes_a_few_weights_beyond_a_tiny_models(dtype: str, tmp_path: Path) -> None:
    tiny, taken = peak(tmp_path / "tiny", TINY, dtype), peak(tmp_path / "large", SIZE, dtype)
    assert (tmp_path / "large" / "out" / "model.onnx.data").stat().st_size > WRITTEN[dtype]
    assert taken - tiny < 3 * LARGEST + RUNTIME, f"{tiny:,} and {taken:,}"
    assert taken < (1 << 30) + 3 * LARGEST
