"""All of HF PEFT's combination types, on linear layers and an embedding: the new adapter's effect is `peft`'s."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftfx
from peftfx.errors import PeftfxError
from peftfx.testing.blocks import DenseBlock
from peftfx.testing.models import Text
from peftfx.testing.setup import assert_close

SPEC = Text((DenseBlock(outer=12), DenseBlock(bias=False, inner=12)))
QUICK = ("svd", "ties", "dare_linear", "dare_ties_svd", "magnitude_prune_svd")
KINDS = (
    "svd",
    *(f"{kind}{end}" for kind in ("ties", "dare_linear", "dare_ties", "magnitude_prune") for end in ("", "_svd")),
)
OPTIONS: dict[str, dict[str, Any]] = {"svd": {"svd_clamp": 0.9}, "ties": {"majority_sign_method": "frequency"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[peft.PeftModel, Path]:
    """Two LoRAs of `peft`'s, of other targets and scales, at random values, and where they are."""
    folder, base = tmp_path_factory.mktemp("two"), SPEC.build()
    one = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["words", "0", "1"])
    theirs = peft.get_peft_model(base, one, adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0", "1"]))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=rng) / 2)
    theirs.eval().save_pretrained(str(folder))
    return theirs, folder


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_a_combination_is_that_of_hf_peft(
    kind: str, saved: tuple[peft.PeftModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, folder = copy.deepcopy(saved[0]), saved[1]
    ours = peftfx.load(SPEC.build(), folder / "one", "one", inputs=SPEC.inputs(2, 3))
    ours.load_adapter(folder / "two", "two")
    options = {**({} if kind == "svd" else {"density": 0.6}), **OPTIONS.get(kind, {})}
    # `peft` draws the start of the new adapter first, and masks behind that.
    monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(4))
    theirs.base_model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type=kind, **options)
    torch.manual_seed(4)
    ours.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", kind, **options)
    theirs.set_adapter("sum")
    inputs = SPEC.inputs(3, 5, 1)
    with torch.no_grad():
        assert_close(ours(**inputs), theirs.eval()(**inputs), 1e-5, kind)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_an_adapter_may_come_twice(kind: str, saved: tuple[peft.PeftModel, Path]) -> None:
    theirs, names, weights = copy.deepcopy(saved[0]), ["one", "two", "one"], [0.7, 0.5, 0.2]
    ours = peftfx.load(SPEC.build(), saved[1] / "one", "one", inputs=SPEC.inputs(2, 3))
    ours.load_adapter(saved[1] / "two", "two")
    theirs.base_model.add_weighted_adapter(names, weights, "sum", combination_type=kind)
    ours.add_weighted_adapter(names, weights, "sum", kind)
    theirs.set_adapter("sum")
    inputs = SPEC.inputs(3, 5, 1)
    with torch.no_grad():
        assert_close(ours(**inputs), theirs.eval()(**inputs), 1e-5, kind)


def test_what_says_nothing_is_refused(saved: tuple[peft.PeftModel, Path]) -> None:
    ours = peftfx.load(SPEC.build(), saved[1] / "one", "one", inputs=SPEC.inputs(2, 3))
    with pytest.raises(PeftfxError, match="and density"):
        ours.add_weighted_adapter(["one", "one"], [1.0, 1.0], "sum", "ties")
    with pytest.raises(PeftfxError, match="unknown way to combine"):
        ours.add_weighted_adapter(["one"], [1.0], "sum", "tie")
