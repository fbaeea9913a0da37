"""A LoRA adapter that `peft` wrote, merged and exported: ONNX Runtime computes what `peft`'s own model does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.few import ALIKE, but_for
from support.parity import adaptable, check
from support.zoo import ZOO, Captured
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.sites.sites import Sites

pytestmark = pytest.mark.further

#: Their layers are of kinds that others here have: convolutions and attentions of vision, a gated text model.
COSTLY = {"unet", "gemma2", "glm", "deberta", "whisper", "blip2", "segformer", "mpt", "convnext"}

# Whisper's code reads fields of these modules that peft's wrappers do not have.
LEFT_OUT = {"whisper": ["conv1", "conv2", "embed_positions"]}


def adapt(model: nn.Module, sites: Sites, directory: Path, **options: object) -> nn.Module:
    """`peft` puts LoRA with random values on every linear, conv and embedding that it can; saved to `directory`."""
    grouped = {n for n, m in model.named_modules() if getattr(m, "groups", 1) > 1}
    chosen = [s.path for s in sites if s.kind in ("linear", "conv", "embedding") and s.role != "head"]
    # peft takes a module's input for its indices, which is wrong for OPT's positions: it computes them itself.
    chosen = [p for p in chosen if p not in grouped and adaptable(model.get_submodule(p))]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": chosen, **options})
    adapted = peft.get_peft_model(model, config)
    randomise(adapted)
    adapted.save_pretrained(str(directory))
    return adapted.eval()


@pytest.mark.parametrize("name", but_for({*ALIKE, *COSTLY}, (n for n in ZOO if n != "custom")))
def test_a_lora_of_peft_is_served_as_peft_computes_it(
    name: str, captured: Callable[[str], Captured], tmp_path: Path
) -> None:
    entry = ZOO[name]
    model = entry.build()
    model.save_pretrained(tmp_path / "base")
    base = copy.deepcopy(model)
    sites = captured(name).graph.sites
    want = adapt(model, sites, tmp_path / "adapter", exclude_modules=LEFT_OUT.get(name))
    report = export_directory(
        tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=entry.task, view="forward"
    )
    assert report.merged
    written = json.loads((tmp_path / "out" / "peftfx_report.json").read_text())
    assert written["merged"] == report.merged
    assert all(shape[0] in ("batch", "image_batch", "images") for shape in report.inputs.values())
    assert all(isinstance(shape[1], str) for n, shape in report.inputs.items() if n.endswith("_ids"))
    check(entry, want, OnnxModel(tmp_path / "out"), base, base)


def test_a_custom_module_goes_the_same_way(captured: Callable[[str], Captured], tmp_path: Path) -> None:
    entry = ZOO["custom"]
    model = entry.build()
    base = copy.deepcopy(model)
    example = entry.inputs()
    want = adapt(model, captured("custom").graph.sites, tmp_path / "adapter")
    adapted = peftfx.load(copy.deepcopy(base), tmp_path / "adapter", inputs=example)
    adapted.export(tmp_path / "out")
    check(entry, want, OnnxModel(tmp_path / "out"), base, base)


class Seven(nn.Module):
    """A model whose code fixes the length of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(99, 8), nn.Linear(7 * 8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.mix(self.words(input_ids).reshape(input_ids.shape[0], 7 * 8))


def test_a_size_that_the_code_fixes_is_kept_where_it_was_chosen(tmp_path: Path) -> None:
    given = {"input_ids": torch.randint(99, (2, 7))}
    adapted = peftfx.transform(Seven().eval(), peftfx.LoRA(r=2, target="mix"), inputs=given)
    said = r"code fixes the sequence, here at 7, in test_peft_lora\.py:\d+ \(`return self\.mix\("
    with pytest.raises(peftfx.PeftfxError, match=said):
        adapted.export(tmp_path / "out")
    report = adapted.export(tmp_path / "out", inputs=given)
    assert report.inputs == {"input_ids": ["batch", 7]}
    assert {tuple(shapes["input_ids"]) for shapes in report.probes} == {(1, 7), (2, 7), (3, 7)}
