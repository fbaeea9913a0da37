"""Every model type that is right in float32 is so in half precision: by default two, and all with `pytest -m zoo`.

An export is held to torch's half precision within its own noise, and without the rounding to float32's exactness.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from every_model.checks import build
from every_model.sweep import Key, read
from torch import nn

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxWarning

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHORT: dict[str, Key] = {
    "bf16": ("text-generation", "decode", "qwen2"),
    "fp16": ("text-classification", "forward", "bert"),
}
_VIEWS = (
    *(("text-generation", "decode"), ("text2text-generation", "decode")),
    *(("text-classification", "forward"), ("image-classification", "forward")),
)


def _cases() -> list[object]:
    right = [key for key, found in read().items() if key[:2] in _VIEWS and found.status == "equal"]
    marks, pairs = (pytest.mark.slow, pytest.mark.zoo), [(kind, key) for key in right for kind in KINDS]
    rest = [pytest.param(*p, id="-".join((p[0], *p[1])), marks=marks) for p in pairs if SHORT[p[0]] != p[1]]
    return [*(pytest.param(kind, key, id="-".join((kind, *key))) for kind, key in SHORT.items()), *rest]


@pytest.mark.parametrize(("kind", "key"), _cases())
def test_half_precision_rounds_as_torch_and_computes_the_same(kind: str, key: Key, tmp_path: Path) -> None:
    task, view, model_type = key
    base = build(task, model_type).to(KINDS[kind])
    try:
        with torch.no_grad():
            base(**example_inputs(base))
    except RuntimeError as error:  # code of the model that mixes dtypes itself, or torch has no such operator
        pytest.skip(str(error))
    adapted = peftfx.transform(base, _rule(base), seed=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", PeftfxWarning)
        adapted.export(tmp_path / "out", view=view, merge=kind == "fp16")
    assert not [str(w.message) for w in told if "its graph differ" in str(w.message)]


def _rule(base: nn.Module) -> peftfx.LoRA:
    """A random LoRA on all that is linear but the head, or on the convolutions, or on the head of a model of neither.

    On convolutions its scale is small: their batch norms have the statistics of the base alone, and a large one ends in
    numbers that float16 does not have.
    """
    sites = [site for site in peftfx.inspect(base) if site.kind in ("linear", "conv")]
    if any(site.kind == "linear" and site.role != "head" for site in sites):
        return peftfx.LoRA(r=4, target="all-linear", init_lora_weights=False)
    convs = [site.path for site in sites if site.kind == "conv" and site.groups == 1]
    return peftfx.LoRA(r=4, lora_alpha=1, target=" | ".join(convs) or "head", init_lora_weights=False)
