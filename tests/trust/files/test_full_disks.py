"""A disk that is full, or a limit on files, is told in words, and nothing half-written is left."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.adapted import adapt

from peftfx import LoRA, PeftfxError
from peftfx.training.checkpoints import room_for


def test_an_adapter_that_cannot_be_saved_leaves_no_directory(tmp_path: Path) -> None:
    """safetensors tells of the system's errors in words of its own."""
    adapted = adapt("llama", LoRA(r=4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(PeftfxError, match=r"cannot write: File too large \[.*out\]"):
            adapted.save_pretrained(tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    adapted.save_pretrained(tmp_path / "new" / "out")


@pytest.mark.parametrize(("free", "raised"), [(40_000, PeftfxError), (4_000_000, RuntimeError)])
def test_a_disk_too_full_for_a_checkpoint_is_told(
    free: int, raised: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(raised), room_for(tmp_path, {"a": torch.zeros(1000)}):
        raise RuntimeError("unexpected pos 7808 vs 7696")
