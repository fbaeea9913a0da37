"""A LoRA adapter that `peft` wrote, merged and exported: ONNX Runtime computes what `peft`'s own model does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from few import ALIKE, but_for
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D
from zoo import ZOO, Entry

import peftfx
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.graph.graph import leaf_names
from peftfx.views.view import without_cache

# Whisper's code reads fields of these modules that peft's wrappers do not have.
LEFT_OUT = {"whisper": ["conv1", "conv2", "embed_positions"]}
UNSEEN = ((3, 11), (1, 6))  # batch, sequence


def adaptable(module: nn.Module) -> bool:
    """Whether `peft` adapts a module: one of these types, or a linear layer of a model's own (Falcon's)."""
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Embedding, Conv1D) or isinstance(module, nn.Linear)


def adapt(model: nn.Module, directory: Path, **options: object) -> nn.Module:
    """`peft` puts LoRA with random values on every linear, conv and embedding that it can; saved to `directory`."""
    sites = peftfx.inspect(model, inputs=options.pop("inputs", None))
    grouped = {n for n, m in model.named_modules() if getattr(m, "groups", 1) > 1}
    chosen = [s.path for s in sites if s.kind in ("linear", "conv", "embedding") and s.role != "head"]
    # peft takes a module's input for its indices, which is wrong for OPT's positions: it computes them itself.
    chosen = [p for p in chosen if p not in grouped and adaptable(model.get_submodule(p))]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": chosen, **options})
    adapted = peft.get_peft_model(model, config)
    randomise(adapted)
    adapted.save_pretrained(str(directory))
    return adapted.eval()


def randomise(model: nn.Module) -> None:
    """Adapters at their initial values hide every bug."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the eager model returns, by the names that its export has."""
    with torch.no_grad(), without_cache(model):
        result = model(**inputs)
    named = zip(leaf_names(result), pytree.tree_leaves(result), strict=True)
    return {name: value for name, value in named if isinstance(value, Tensor)}  # a cache may be a leaf


def check(entry: Entry, want: nn.Module, got: OnnxModel, model: nn.Module, base: nn.Module) -> None:
    """Equal to 1e-4 of the largest value at two unseen shapes, where there is no padding; and not the base's."""
    for seed, (batch, sequence) in enumerate(UNSEEN):
        inputs = entry.inputs(batch, sequence, seed + 3, model=model)
        expected, plain = outputs(want, inputs), outputs(base, inputs)
        # A UNet's input and output are both called `sample`; in ONNX they cannot be.
        found = {name.removesuffix(".output"): value for name, value in got(**inputs).items()}
        changed = 0.0
        for name in found:
            a, b = expected[name], found[name]
            assert a.shape == b.shape
            mask = inputs.get("attention_mask")
            if mask is not None and a.shape[:2] == mask.shape:
                a, b = a[mask.bool()], b[mask.bool()]
            scale = max(1.0, float(a.abs().max()))
            assert float((a - b).abs().max()) <= 1e-4 * scale, name
            changed = max(changed, float((expected[name] - plain[name]).abs().max()) / scale)
        assert changed > 1e-3, "the adapter changes nothing: the test would pass without it"


@pytest.mark.parametrize("name", but_for(ALIKE, (n for n in ZOO if n != "custom")))
def test_a_lora_of_peft_is_served_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model = entry.build()
    model.save_pretrained(tmp_path / "base")
    base = copy.deepcopy(model)
    want = adapt(model, tmp_path / "adapter", exclude_modules=LEFT_OUT.get(name))
    report = export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=entry.task)
    assert report.merged
    written = json.loads((tmp_path / "out" / "peftfx_report.json").read_text())
    assert written["merged"] == report.merged
    assert all(shape[0] == "batch" for shape in report.inputs.values())
    assert all(isinstance(shape[1], str) for n, shape in report.inputs.items() if n.endswith("_ids"))
    check(entry, want, OnnxModel(tmp_path / "out"), base, base)


def test_a_custom_module_goes_the_same_way(tmp_path: Path) -> None:
    entry = ZOO["custom"]
    model = entry.build()
    base = copy.deepcopy(model)
    example = entry.inputs()
    want = adapt(model, tmp_path / "adapter", inputs=example)
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
    with pytest.raises(peftfx.PeftfxError, match="code fixes the sequence, here at 7"):
        adapted.export(tmp_path / "out")
    report = adapted.export(tmp_path / "out", inputs=given)
    assert report.inputs == {"input_ids": ["batch", 7]}
    assert {tuple(c["shapes"]["input_ids"]) for c in report.comparisons} == {(1, 7), (3, 7), (4, 7)}
