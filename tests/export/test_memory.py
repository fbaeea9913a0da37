"""An export holds a few tensors, never the model: a bound on its anonymous memory; and what the report says of it."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import contenders
import numpy as np
import pytest
from checkpoint import Size, write_checkpoint
from measure import measured

from peftfx.export.stages import Stages
from peftfx.export.writing.memory import memory_line

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
    report = json.loads((tmp_path / "large" / "out" / "peftfx_report.json").read_text(encoding="utf-8"))
    assert max(report["memory"].values()) == pytest.approx(taken, rel=0.1), "as the process is seen from outside"
    assert taken - tiny < 3 * LARGEST + RUNTIME, f"{tiny:,} and {taken:,}"
    assert taken < (1 << 30) + 3 * LARGEST


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
def test_a_stage_tells_the_most_memory_that_it_has() -> None:
    seconds, memory, threads = dict[str, float](), dict[str, int](), threading.active_count()
    stages = Stages(seconds, memory, lambda name: None)
    with stages("small"):
        pass
    with stages("large"):
        held = np.ones(200 << 20, np.uint8)
        time.sleep(0.2)
        del held
    with stages("after"):
        pass
    assert seconds["large"] >= 0.2
    assert (200 << 20) * 0.95 < memory["large"] - memory["small"] < (200 << 20) * 1.2
    assert memory["after"] < memory["large"] - (190 << 20)
    with pytest.raises(ValueError, match="ends"), stages("broken"):
        raise ValueError("it ends early")
    time.sleep(0.1)
    assert threading.active_count() == threads, "who looks goes away with the stage"
    assert memory_line({"capture": 1_234_000_000}) == "capture 1.23 GB at most, without mapped files"
    assert memory_line({}) == ""
