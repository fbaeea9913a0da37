"""Providers: where ONNX Runtime computes, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from support.command import Result, assert_refused
from torch import Tensor, nn

from peftfx import PeftfxError, export_onnx, runtime
from peftfx.serving.providers import chosen_providers

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("doubles") / "out"
    export_onnx(Doubles(), out, inputs={"x": torch.ones(2, 3)})
    return out


def test_short_names_and_options_are_onnxruntimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", ort.get_all_providers)
    assert chosen_providers(()) == [CPU]
    options = ("openvino", {"precision": "FP32"})
    chosen = chosen_providers(["cuda", options, "DirectML", CUDA])
    assert chosen == [CUDA, ("OpenVINOExecutionProvider", options[1]), "DmlExecutionProvider", CPU]


def test_what_is_not_there_is_said(directory: Path, peftfx: Callable[..., Result]) -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    run = ("run", directory, "--text", "w5", "--task", "fill-mask", "--provider")
    assert_refused(peftfx(*run, "cuda"), "built without", CPU, "onnxruntime-gpu")
    assert_refused(peftfx(*run, "cud"), "did you mean 'cuda'")
    with pytest.raises(PeftfxError, match="not a list"):
        runtime.load(directory, providers="cpu")
    x = torch.randn(2, 3)
    assert runtime.load(directory, providers=["cpu"])(x=x)["output"].equal(2 * x)


def test_a_session_that_falls_back_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a provider's libraries are missing: ONNX Runtime then runs on the CPU, and says so in its log alone."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(PeftfxError, match="could not start CUDAExecutionProvider"):
        runtime.load(directory, providers=["cuda"])
