"""A text that a served model writes is one adapter's, whatever other threads make active meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from support.slots import GREEDY, adapted_by, texts
from support.zoo import ZOO
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from peftfx import IA3, LoRA, export_onnx, runtime
from peftfx.export.slots.adapter_export import export_adapter


class Switching(LogitsProcessor):
    """Makes another adapter active after the first token, in a thread of its own or in the one that writes."""

    def __init__(self, served: runtime.Served, *, apart: bool) -> None:
        self.served, self.apart = served, apart

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.apart:
            thread = threading.Thread(target=self.served.set_adapter, args=("second",))
            thread.start()
            thread.join()
        else:
            self.served.set_adapter("second")
        return scores


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.further)])
def test_an_adapter_that_another_thread_makes_active_waits_for_the_next_text(name: str, tmp_path: Path) -> None:
    export_onnx(ZOO[name].build(), tmp_path / "graph", slots="all-linear")
    adapted = adapted_by(name, {"first": LoRA(r=4, target="all-linear"), "second": IA3()})
    served, want = runtime.load(tmp_path / "graph"), {}
    for adapter in ("second", "first"):
        adapted.set_adapter(adapter)
        want[adapter] = adapted.generate(**texts(), **GREEDY)
        served.load_adapter(export_adapter(adapted, tmp_path / "graph", tmp_path / adapter), adapter)
    assert not torch.equal(want["first"], want["second"])
    switching = LogitsProcessorList([Switching(served, apart=True)])
    assert torch.equal(served.generate(**texts(), **GREEDY, logits_processor=switching), want["first"])
    assert served.active == "second"
    assert torch.equal(served.generate(**texts(), **GREEDY), want["second"])
    served.set_adapter("first")
    switching = LogitsProcessorList([Switching(served, apart=False)])
    written = served.generate(**texts(), **GREEDY, logits_processor=switching)
    assert not any(torch.equal(written, one) for one in want.values())  # a thread may switch in its own text
    assert torch.equal(served.generate(**texts(), **GREEDY), want["second"])
