"""Adapters for a graph whose base is quantised: wrong tensors are refused, however much the base's rounding loses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.slots import stirred
from support.zoo import ZOO
from torch import Tensor

from peftfx import (
    IA3,
    LlamaAdapter,
    LNTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    export_adapter,
    export_onnx,
    transform,
)
from peftfx.errors import PeftfxWarning
from peftfx.export.slots import adapter_export
from peftfx.export.slots.swappable import Slots
from peftfx.export.verification.comparison import VerificationError
from peftfx.graph.slots import Manifest

RULES = {
    "lora": LoRA(r=4, target="all-linear"),
    "dora": LoRA(r=3, target="attention", use_dora=True),
    "ia3": IA3(),
    "norms": LNTuning(),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "llama adapter": LlamaAdapter(adapter_len=3, adapter_layers=1),
}
#: Models and views, and the rules that their graphs take.
GRAPHS = {
    "llama": ("decode", ("lora", "dora", "ia3", "norms", "prompt", "prefix", "llama adapter")),
    "gpt2": ("forward", ("lora", "norms", "prefix")),
    "t5": ("decode", ("lora", "prompt", "prefix")),
    "bert": ("forward", ("dora", "prompt")),
}


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("gpt2", ("lora",)),
        *(pytest.param(name, GRAPHS[name][1], marks=pytest.mark.further) for name in ("llama", "gpt2")),
        *(pytest.param(name, GRAPHS[name][1], marks=pytest.mark.slow) for name in ("bert", "t5")),
    ],
)
def test_wrong_tensors_are_refused(
    name: str, rules: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor of an adapter, off by a tenth, changes less than int4 loses here; and is refused."""
    view = GRAPHS[name][0]
    model, graph = ZOO[name].build(), tmp_path / "graph"
    export_onnx(model, graph, view=view, slots="all-linear", quantize="int4")
    assert Manifest.read(graph).lost > 0.05
    adapted, right = transform(model, RULES[rules[0]], "x", seed=0), adapter_export.slot_tensors
    for rule in rules:
        adapted.remove()
        adapted.add_adapter("x", RULES[rule], seed=0)
        export_adapter(stirred(adapted, "x"), graph, tmp_path / rule)

        def wrong(*args: object) -> dict[str, Mapping[str, Tensor]]:
            return {stem: {key: t * 1.1 for key, t in own.items()} for stem, own in right(*args).items()}

        monkeypatch.setattr(adapter_export, "slot_tensors", wrong)
        with pytest.raises(VerificationError, match=r"in torch, disagrees with the reference"):
            export_adapter(adapted, graph, tmp_path / f"{rule}, wrong")
        monkeypatch.setattr(adapter_export, "slot_tensors", right)
    assert not list(tmp_path.glob("*wrong*"))


@pytest.mark.further
def test_a_right_adapter_under_which_the_base_loses_more_is_written(tmp_path: Path) -> None:
    model, graph = ZOO["llama"].build(), tmp_path / "graph"
    export_onnx(model, graph, view="forward", slots="all-linear", quantize="int8")
    small = Manifest.read(graph)
    adapted = stirred(transform(model, RULES["lora"], "x", seed=0), "x")
    low = tmp_path / "low"
    low.mkdir()
    for file in graph.iterdir():
        (low / file.name).write_bytes(file.read_bytes())
    text = (low / "peftfx_slots.json").read_text()
    (low / "peftfx_slots.json").write_text(text.replace(f'"lost": {small.lost}', '"lost": 1e-4'))
    with pytest.warns(PeftfxWarning, match=r"of the largest output from torch, and 0.0001 with random adapters"):
        export_adapter(adapted, low, tmp_path / "adapter")
    assert (tmp_path / "adapter.onnx_adapter").exists()
    bounded = tmp_path / "bounded"
    export_onnx(model, bounded, view="forward", slots="all-linear", quantize="int8", max_error=0.5)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.mul_(1e3)
    export_adapter(adapted, bounded, tmp_path / "strong")
    assert Manifest.read(bounded).rtol == 0.5


@pytest.mark.parametrize(("name", "prefix"), [("llama", False), pytest.param("whisper", True, marks=pytest.mark.slow)])
def test_empty_slots_agree_with_the_model_as_no_slots_do(name: str, prefix: bool, tmp_path: Path) -> None:
    model = ZOO[name].build()
    agreements = []
    for slots in (None, Slots("attention.query", prefix=prefix)):
        report = export_onnx(model, tmp_path / str(slots is None), view="decode", quantize="int8", slots=slots)
        agreements += [one.top1 for one in report.agreement.values()]
    assert agreements[1] == pytest.approx(agreements[0], abs=0.05)
