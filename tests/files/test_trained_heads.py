"""A head trained beside an adapter is saved with it, for every method of `peft`'s: it reads ours, and we read its."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapted import randomise
from support.adapter_files import first, load_peft, same
from support.zoo import ZOO

import peftfx
from peftfx.contract.method import Method
from peftfx.contract.sequence import SequenceMethod
from peftfx.errors import PeftfxWarning
from peftfx.methods import methods
from peftfx.model.adapted import AdaptedModel
from peftfx.rules.peft_files import WEIGHTS

SHARED = {name: cls for name, cls in methods().items() if name in peft.PeftType.__members__}

#: Options of methods whose defaults are for larger layers.
SIZES: dict[str, dict[str, int]] = {
    "C3A": {"block_size": 4},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 1},
    "VBLORA": {"vector_length": 4},
    "WAVEFT": {"n_frequency": 20},
}


@pytest.mark.parametrize("cls", SHARED.values(), ids=SHARED)
def test_a_head_of_its_own_crosses_in_both_directions(
    cls: type[Method], bare: Callable[[str], AdaptedModel], tmp_path: Path
) -> None:
    """One model takes all three adapters, one after another: its capture serves them all."""
    weights = not issubclass(cls, SequenceMethod)
    causal = "attention" in cls.kinds or cls is peftfx.CPT
    name, head = ("llama", "lm_head") if causal else ("bert", "classifier")
    options = {"target_modules": ["query", "value"]} if weights and name == "bert" else {}
    options |= SIZES.get(cls.peft_type, {})
    if cls is peftfx.TrainableTokens:
        options = {"token_indices": [1, 5]}
    ours = bare(name)
    ours.add_adapter("default", cls.from_options({**options, "modules_to_save": [head]}), seed=0)
    randomise(ours.adapters)
    inputs = ZOO[name].inputs(3, 5, 4, model=ours.base)
    inputs |= {asked: torch.zeros(3, dtype=torch.long) for asked in ours.adapter("default").rules[0].inputs}
    want = first(ours, inputs)
    ours.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / WEIGHTS)
    assert any(key.endswith(f"{head}.weight") for key in written)
    _reloaded(ours, tmp_path / "ours")
    same(first(ours, inputs), want)

    theirs = load_peft(ZOO[name].build(), tmp_path / "ours")
    if cls in (peftfx.PrefixTuning, peftfx.Cartridge):  # peft reads and writes it, and cannot run it
        with pytest.raises(ValueError, match="does not support past key values"):
            first(theirs, inputs)
    else:
        # peft's classifier takes `task_ids` for prompts, and passes none on to Poly's layers
        same(first(theirs.base_model if cls is peftfx.Poly else theirs, inputs), want)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_file(tmp_path / "theirs" / WEIGHTS)
    if cls in (peftfx.LlamaAdapter, peftfx.TrainableTokens):  # peft reads the head, runs it, and leaves it out
        assert written.keys() - again.keys() == {key for key in written if f".{head}." in key}
        ours.remove()
        return
    # RandLoRA's bases, which a file has once, are in theirs once more for each module.
    again = {k: t for k, t in again.items() if k in written or f"base_model.{k.rpartition('.')[2]}" not in written}
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], written[key]) for key in again)
    _reloaded(ours, tmp_path / "theirs")
    same(first(ours, inputs), want)
    ours.remove()


def test_a_copy_inside_a_copy_is_trained_and_told(tmp_path: Path) -> None:
    """HF PEFT saves the inner one, and neither runs nor trains it."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp", "down_proj"])
    theirs = peft.get_peft_model(ZOO["llama"].build(), copy.deepcopy(config))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*inside a copy")
        ours = peftfx.load(ZOO["llama"].build(), tmp_path / "theirs")
    given = ZOO["llama"].inputs(2, 5)
    for model in (ours, theirs):
        model(**given).logits.square().sum().backward()
    inner = [p.grad for m in (ours, theirs) for n, p in m.named_parameters() if "down_proj" in n and p.requires_grad]
    assert len(inner) == 4
    assert [grad is not None for grad in inner] == [True, True, False, False]
    randomise(ours.adapters)
    with pytest.warns(PeftfxWarning, match=r"(?s)other outputs at .*down_proj.*inside a copy of another module"):
        ours.save_pretrained(tmp_path / "ours")
    again = peftfx.load(ZOO["llama"].build(), tmp_path / "ours")
    same(first(again, given), first(ours, given))


def _reloaded(model: AdaptedModel, directory: Path) -> None:
    """Put the adapter in a directory in the place of the model's own."""
    model.remove()
    model.load_adapter(directory, "default")
