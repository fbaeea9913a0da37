"""DeepSpeed's ZeRO-1, 2 and 3 over two processes train the adapter of one; under ZeRO-3 it is gathered to be saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from sharded.processes import in_two
from sharded.zero import trained_under_zero


@pytest.mark.slow
@pytest.mark.deepspeed
def test_every_stage_trains_the_adapter_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason='no deepspeed here: pip install "peftfx[deepspeed]"')
    for found in in_two(trained_under_zero, tmp_path):
        for stage, seen in found.items():
            assert seen["losses"] < 1e-5, stage
            assert seen["saved"] < 1e-5 < 1e-2 < seen["moved"], stage
            assert "ZeRO keeps the gradient" in seen["ranks"], stage
        assert "ONNX Runtime = torch" in found[3]["report"]
        assert "ZeRO-3" in found[3]["merge"]
        assert "merged" in found[3]["merge"]
        assert "ahead of `deepspeed.initialize`" in found[3]["again"]
        parted = found[3]
        assert parted["parted"] == 0
        assert abs(parted["prefix"]) < 1e-5
        assert parted["parted losses"] < 1e-5
        assert parted["parted saved"] < 1e-5
        for export in ("first", "decode"):
            assert "ONNX Runtime = torch" in parted[export]
    assert (tmp_path / "3" / "onnx" / "model.onnx").is_file()
