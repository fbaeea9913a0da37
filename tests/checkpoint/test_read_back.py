"""Rows of a table, and experts that no text chooses, are compared with their source in the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from every_model.checks import build

import peftfx
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.writing import weights

#: a model, a tensor of it, and how it is exported: in half precision if it is gpt2
CASES = [
    ("llama", "embed_tokens.weight", {"merge": True}, "embedding.token"),
    ("gpt2", "wpe.weight", {"merge": False}, "all-linear"),
    ("qwen3_moe", "experts.gate_up_proj", {"merge": True}, "experts.up"),
    pytest.param("qwen3_moe", "experts.down_proj", {"view": "decode"}, "all-linear", marks=pytest.mark.further),
    pytest.param("llama", "embed_tokens.weight", {"batched": ["default"]}, "all-linear", marks=pytest.mark.further),
]


@pytest.mark.parametrize(("model_type", "name", "options", "target"), CASES)
def test_a_number_that_no_call_reads_is_compared(
    model_type: str, name: str, options: dict, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("text-generation", model_type).to(torch.float16 if model_type == "gpt2" else torch.float32)
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target=target))
    for parameter in adapted.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapted.export(tmp_path / "good", **options)
    own, spoiled = weights._bytes, []

    def lossy(place: weights._Place, infinite: object) -> Iterator[memoryview]:
        for part in own(place, infinite):  # type: ignore[arg-type]
            if name in str(place.value.name) and not spoiled:
                spoiled.append(place.value.name)
                copy = bytearray(part)
                copy[-1] ^= 0x40  # the highest bit of the last number's exponent
                yield memoryview(copy)
            else:
                yield part

    monkeypatch.setattr(weights, "_bytes", lossy)
    with pytest.raises(VerificationError, match=rf"1 of [\d,]+ numbers of .*{name}"):
        adapted.export(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
