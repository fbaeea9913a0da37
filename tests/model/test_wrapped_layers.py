"""Layers of an adapted base that `peft` puts into layers of its own: an adapter's layers are found by their paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from quantised import in_memory as made
from support import quantised as q
from support.adapted import randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError

QUERIES = peftfx.LoRA(r=4, target_modules=["q_proj"])
IDS = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
CHANGES: dict[str, Callable[[Any, Path], object]] = {
    "load": lambda model, path: model.load_adapter(path / "queries", "new"),
    "add": lambda model, _: model.add_adapter("new", QUERIES),
    "merge": lambda model, _: model.merge(),
    "export": lambda model, path: model.export(path / "onnx", view="forward"),
}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def wrap(base: nn.Module, layer: str = "q_proj", *, init_lora_weights: bool = False) -> None:
    """Let `peft` put its own layers around the base's; without `init_lora_weights` they have random tensors."""
    config = peft.LoraConfig(r=2, target_modules=[layer], init_lora_weights=init_lora_weights)
    peft.inject_adapter_in_model(config, base)


def adapted(base: nn.Module) -> peftfx.AdaptedModel:
    model = peftfx.transform(base, QUERIES, seed=0)
    randomise(model)
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("road", ["modules", "graph"])
def test_what_would_pass_by_such_layers_is_refused(change: str, road: str, tmp_path: Path) -> None:
    """A new adapter did nothing there, without a word."""
    adapted(ZOO["llama"].build()).save_pretrained(tmp_path / "queries")
    model = peftfx.transform(ZOO["llama"].build(), QUERIES, seed=0, road=road)
    wrap(model.base)
    with pytest.raises(PeftfxError, match=r"2 layers of the adapter into a module of its own \(peft.tuners.lora"):
        CHANGES[change](model, tmp_path)
    assert model.names() == ("default",)


def test_an_adapter_that_was_there_acts_inside_of_them() -> None:
    model = adapted(ZOO["llama"].build())
    want = logits(model)
    wrap(model.base, init_lora_weights=True)  # which change nothing
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("change", ["add", "merge", "export"])
def test_other_layers_are_adapted_merged_and_exported_as_before(change: str, tmp_path: Path) -> None:
    model = adapted(ZOO["llama"].build())
    wrap(model.base, "up_proj")
    want = logits(model)
    CHANGES[change](model, tmp_path)
    if change != "export":  # which holds its own outputs against the model's
        model.set_adapter("default") if change == "add" else None
        torch.testing.assert_close(logits(model), want)


@pytest.mark.parametrize("change", ["add", "merge", "export"])
def test_a_quantised_base_with_new_modules_is_refused(change: str, tmp_path: Path) -> None:
    """Its weights are read by a twin that has no such modules: it was a KeyError."""
    pytest.importorskip("bitsandbytes")
    model = adapted(made.bitsandbytes4(q.tiny(), double=False))
    wrap(model.base)
    with pytest.raises(PeftfxError, match=r"into the base since the base was adapted: a peft.tuners.lora.layer"):
        CHANGES[change](model, tmp_path)
