"""Slots of graphs that are not in float32: what is put there is the adapted model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_swappable import stirred
from zoo import ZOO

from peftfx import LoRA, PrefixTuning, export_onnx, transform
from peftfx.export.adapter_files import read_adapter_file
from peftfx.export.adapters import export_adapter
from peftfx.export.probes import view_cases
from peftfx.export.verify import VerificationError, reference_of, verify

HALVES = {"fp16": (torch.float16, 10), "bf16": (torch.bfloat16, 16)}  #: and their numbers in ONNX


@pytest.mark.parametrize("name", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_base_in_half_precision_has_slots_and_rows_in_it(name: str, tmp_path: Path) -> None:
    dtype, number = HALVES[name]
    model = ZOO["llama"].build().to(dtype)
    report = export_onnx(model, tmp_path / "graph", view="decode", slots="all-linear")
    assert ("twin" in report.verified) == (name == "bf16")
    rules = {"low": [LoRA(r=2, target="mlp", use_dora=True), PrefixTuning(num_virtual_tokens=3)], "other": LoRA(r=3)}
    adapted = transform(model, rules["low"], "low", seed=0)
    path = export_adapter(stirred(adapted, "low"), tmp_path / "graph", tmp_path / "low")  # held against torch
    assert {value.element_type() for value in read_adapter_file(path)[1].values()} == {number}
    view, graph = adapted.view("decode"), adapted.graph(view="decode")
    assert view is not None
    cases = view_cases(adapted, view)[:1]
    with pytest.raises(VerificationError):  # the base alone is another model
        verify(tmp_path / "graph", reference_of(graph), cases, atol=2e-2, rtol=2e-2, shown=view.shown)
    adapted.add_adapter("other", rules["other"], seed=0)
    batched = stirred(adapted, "other").export(tmp_path / "many", view="decode", batched=["low", "other"])
    assert batched.max_rel < 3e-2  # each row was held against its adapter alone
