"""Examples of codes of several codebooks have the form in which the model's own code takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every_model.checks import build

import peftfx
from peftfx import PeftfxError
from peftfx.bases.example_inputs import example_inputs


@pytest.mark.parametrize(
    ("task", "kind", "name", "shape"),
    [
        ("text-generation", "musicgen", "input_ids", (3 * 4, 6)),
        ("speech-to-text", "kyutai_speech_to_text", "input_ids", (3, 6, 5)),
        ("speech-to-text", "dia", "decoder_input_ids", (3, 4, 9)),
        ("text-generation", "gpt2", "input_ids", (3, 6)),
    ],
    ids=["a row for each", "a text beside them", "an axis", "tokens"],
)
def test_codes_have_the_form_that_the_model_takes(task: str, kind: str, name: str, shape: tuple[int, ...]) -> None:
    model = build(task, kind)
    made = example_inputs(model, sizes={"batch": 3, "sequence": 6, "decoder_sequence": 4})
    assert made[name].shape == shape
    with torch.no_grad():
        model(**made)


@pytest.mark.parametrize(
    ("task", "kind"),
    [("text-generation", "musicgen"), ("speech-to-text", "kyutai_speech_to_text"), ("speech-to-text", "dia")],
)
def test_a_decode_view_of_codes_is_refused(task: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="codes of several codebooks"):
        peftfx.export_onnx(build(task, kind), tmp_path / "out", view="decode")
    assert not (tmp_path / "out").exists()
