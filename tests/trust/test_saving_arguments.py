"""`save_pretrained` does what HF PEFT's arguments say, or refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftfx
from peftfx import LoRA, PeftfxError
from peftfx.model.adapted import AdaptedModel

INPUTS = {"input": torch.randn(2, 4)}


@pytest.fixture
def adapted() -> AdaptedModel:
    """Three adapters on one layer."""
    model = peftfx.transform(nn.Linear(4, 3), LoRA(r=1, target="all-linear | head"), "one", inputs=INPUTS)
    for name in ("two", "three"):
        model.add_adapter(name, LoRA(r=1, target="all-linear | head"))
    return model


def folders(directory: Path) -> set[str]:
    """Where there are adapters."""
    return {str(path.parent.relative_to(directory)) for path in directory.rglob("adapter_config.json")}


def test_selected_adapters_are_those_that_are_saved(adapted: AdaptedModel, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path / "a", selected_adapters=["one", "three"])
    adapted.save_pretrained(tmp_path / "b", selected_adapters=["two"])
    adapted.save_pretrained(tmp_path / "c", is_main_process=False)
    assert folders(tmp_path / "a") == {"one", "three"}
    assert folders(tmp_path / "b") == {"two"}  # as in HF PEFT
    adapted.save_pretrained(tmp_path / "d", "two")
    assert folders(tmp_path / "d") == {"."}
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"selected_adapters": ["one", "tow"]}, "no adapter named 'tow'"),
        ({"safe_serialization": False}, "peftfx does not write pickles"),
        ({"state_dict": {}}, "the adapters' own tensors"),
        ({"save_embedding_layers": True}, "the base has no embeddings"),
        ({"save_embedding_layers": "always"}, "one of 'auto', True, False"),
        ({"push_to_hub": True}, "pushes to no repository"),
        ({"path_initial_model_for_weight_conversion": "start"}, "its start has not changed the base"),
        ({"adapter_name": "one", "selected_adapters": ["one"]}, "are both given"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    adapted: AdaptedModel, arguments: dict[str, object], why: str, tmp_path: Path
) -> None:
    with pytest.raises(PeftfxError, match=why):
        adapted.save_pretrained(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_what_accelerate_gives_to_save_pretrained_is_taken(adapted: AdaptedModel, tmp_path: Path) -> None:
    own = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    adapted.save_pretrained(tmp_path / "a", is_main_process=True, save_function=torch.save, state_dict=own)
    assert folders(tmp_path / "a") == {"one", "two", "three"}
    adapted.save_pretrained(tmp_path / "b", is_main_process=False, save_function=torch.save, state_dict={})
    assert not (tmp_path / "b").exists()
    own[next(iter(own))] += 1
    with pytest.raises(PeftfxError, match="takes no other state"):
        adapted.save_pretrained(tmp_path / "b", save_function=torch.save, state_dict=own)


def test_an_argument_that_nobody_knows_is_a_type_error(adapted: AdaptedModel, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="selected_adapter"):
        adapted.save_pretrained(tmp_path, selected_adapter=["one"])


def test_an_empty_name_is_not_the_working_directory(
    adapted: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script's variable that was never set; HF PEFT and transformers refuse it too."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PeftfxError, match="name is empty"):
        adapted.save_pretrained("")
    assert not any(tmp_path.iterdir())
    adapted.save_pretrained(".", "one", max_shard_size="1MB")  # an argument for whole models, as HF PEFT takes it
    assert folders(tmp_path) == {"."}


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_base_without_values_takes_no_file(kind: str, tmp_path: Path, adapted: AdaptedModel) -> None:
    adapted.save_pretrained(tmp_path, "one")
    with torch.device("meta") if kind == "meta" else FakeTensorMode(allow_non_fake_inputs=True):
        empty = nn.Linear(4, 3)
    with pytest.raises(PeftfxError, match="the base has no values here"):
        peftfx.load(empty, tmp_path, inputs=INPUTS)
