"""Image tokens that a model writes itself: transformers reads them as text, and so do the graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from every_model.checks import build
from torch import Tensor

import peftfx as compiler
from peftfx import PeftfxError, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of

pytestmark = pytest.mark.further

NEW = 6
PICTURE = (64, 64)
#: a class with a `generate` of its own, a plain one, one with features for deeper layers, one with masks by types
MODELS = {"blip-2": None, "llava": None, "qwen3_vl": PICTURE, "gemma3": None}


class Writes(hf.LogitsProcessor):
    """Makes the model write a token as its second and third."""

    def __init__(self, token: int) -> None:
        self.token, self.steps = token, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        if self.steps in (2, 3):
            scores = torch.full_like(scores, -1e9)
            scores[:, self.token] = 0
        return scores


def written(model: Any, token: int, given: dict[str, Tensor], **options: object) -> Tensor:
    ways = hf.LogitsProcessorList([Writes(token)])
    own = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "logits_processor": ways}
    found: Tensor = model.generate(**given, **own, **options)
    return found


def asked(base: Any, rows: int) -> dict[str, Tensor]:
    """Prompts with an image each."""
    with pictures_of(MODELS[base.config.model_type]):
        return example_inputs(base, sizes={"batch": rows}, seed=3)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "llava" else pytest.mark.slow) for k in MODELS])
def test_the_runtime_goes_on_as_transformers_does(kind: str, tmp_path: Path) -> None:
    base = build("image-text-to-text", kind)
    token = base.config.image_token_id
    size = {} if MODELS[kind] is None else {"image_size": MODELS[kind]}
    compiler.export_onnx(base, tmp_path / "out", view="decode", **size)
    served = runtime.load(tmp_path / "out")
    for rows, beams in ((1, (1, 2)), (2, (1,))):
        given = asked(base, rows)
        for more in ({"num_beams": count} for count in beams):
            want = written(base, token, given, **more)
            assert bool((want[:, -NEW + 1 : -NEW + 3] == token).all())
            assert torch.equal(written(served, token, given, **more), want)


def test_a_prompt_with_an_image_token_and_no_image_is_refused(tmp_path: Path) -> None:
    base = build("image-text-to-text", "llava")
    compiler.export_onnx(base, tmp_path / "out", view="decode")
    text = torch.tensor([[5, base.config.image_token_id, 6]])
    with pytest.raises(PeftfxError, match="the text has 1 image tokens, and its images 0 pieces"):
        runtime.load(tmp_path / "out").generate(input_ids=text)


@pytest.mark.slow
def test_a_rounded_model_is_measured_on_a_text_with_its_image_token(tmp_path: Path) -> None:
    base = build("image-text-to-text", "blip-2")
    text = base.language_model
    with torch.no_grad():  # so that it writes nothing else
        row = text.get_input_embeddings().weight[base.config.image_token_id]
        text.model.decoder.final_layer_norm.bias.copy_(1000 * row / row.norm())
    report = compiler.export_onnx(base, tmp_path / "out", view="decode", quantize="int8")
    assert any(agreed.text == "its own greedy text" for agreed in report.agreement.values())


@pytest.mark.slow
def test_the_graph_road_goes_on_too(tmp_path: Path) -> None:
    base = build("image-text-to-text", "llava")
    token, given = base.config.image_token_id, asked(base, 2)
    want = written(base, token, given)
    adapted = compiler.transform(base, compiler.LoRA(r=4, target="all-linear"), seed=0, road="graph")
    assert torch.equal(written(adapted, token, given), want)
