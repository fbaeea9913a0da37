"""transformers' `ExportedModel` loads what a forward view was exported to, and answers as the adapted model does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.adapted import randomise
from support.zoo import ZOO
from torch import nn
from transformers import BertForMaskedLM
from transformers.exporters.base import EXPORT_MANIFEST_FILE, ExportedModel

import peftfx


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_it_is_the_adapted_model(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    adapted = peftfx.transform(entry.build(), peftfx.LoRA(r=2, target="attention"), seed=0).eval()
    randomise(adapted.adapters)
    adapted.export(tmp_path / "out", view="forward")
    served = ExportedModel.from_pretrained(tmp_path / "out", device="cpu")
    inputs = entry.inputs(4, 6, 3, model=adapted.base)
    cacheless = {"use_cache": False} if adapted.base.config.model_type == "gpt2" else {}  # a forward view has no cache
    with torch.no_grad():
        want = adapted(**inputs, **cacheless)
    got = served(**inputs)
    assert type(got) is type(want)
    assert got.keys() == want.keys()
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)


class Answer(NamedTuple):
    logits: torch.Tensor


class Answers(BertForMaskedLM):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Answer:  # type: ignore[override]
        return Answer(super().forward(input_ids, attention_mask).logits)


def test_what_has_no_name_for_transformers_is_left_out_and_told(tmp_path: Path) -> None:
    base = Answers(ZOO["bert"].build().config)
    report = peftfx.export_onnx(base, tmp_path / "out", view="forward")
    assert not (tmp_path / "out" / EXPORT_MANIFEST_FILE).exists()
    assert "Answer" in report.not_written[EXPORT_MANIFEST_FILE]
    assert f"not written: {EXPORT_MANIFEST_FILE}: transformers has no name" in str(report)


def test_a_model_of_ones_own_has_no_such_file(tmp_path: Path) -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.layer(x)

    adapted = peftfx.transform(Doubles(), peftfx.LoRA(r=1, target="layer"), inputs={"x": torch.randn(2, 3)})
    adapted.export(tmp_path / "out", view="forward")
    assert not (tmp_path / "out" / "export.json").exists()
