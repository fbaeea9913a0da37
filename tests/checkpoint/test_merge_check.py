"""A merge is held to its weights in float32, and its files to each rounded number."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support import quantised as q
from torch import nn

from peftfx.adapters.deferred import Deferred, computing
from peftfx.errors import PeftfxError
from peftfx.export import merge_command
from peftfx.export.checkpoint import merge_check
from peftfx.export.merge_command import merge_directory
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.writing.read_back import count_wrong

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base in bfloat16, and an adapter whose updates are small beside the rounding of all weights."""
    model = q.tiny(num_hidden_layers=1).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def test_an_update_that_is_lost_is_an_error_in_every_dtype(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = folders
    copied = merge_command.merged_copy

    def lossy(model: nn.Module) -> tuple[nn.Module, object]:
        merged, done = copied(model)
        merged.get_submodule(LAYER).weight = model.base.get_submodule(LAYER).weight
        return merged, done

    merge_directory(base, tmp_path / "good", adapter=adapter)
    monkeypatch.setattr(merge_command, "merged_copy", lossy)
    for options in ({}, {"dtype": "fp16"}, {"quantize": "nf4"}):
        with pytest.raises(VerificationError, match="before its weights are rounded"):
            merge_directory(base, tmp_path / "out", adapter=adapter, **options)
    with pytest.raises(VerificationError, match="of what was written"):
        merge_directory(base, tmp_path / "out", adapter=adapter, dtype="fp32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "path"), [({}, LAYER), ({}, "lm_head"), ({"quantize": "int8"}, "model.norm")])
def test_one_number_that_is_read_otherwise_is_an_error(
    options: dict[str, str], path: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = folders
    load: Callable[..., nn.Module] = merge_check.load_base

    def lossy(directory: Path, **given: object) -> nn.Module:
        loaded = load(directory, **given)
        module = loaded.get_submodule(path)
        numbers = module.weight.detach() * 1.0
        numbers.view(-1)[3] *= 1.01
        module.weight = nn.Parameter(numbers)
        return loaded

    monkeypatch.setattr(merge_check, "load_base", lossy)
    with pytest.raises(VerificationError, match=rf"1 of [\d,]+ numbers of {path}.weight are not the merged ones"):
        merge_directory(base, tmp_path / "out", adapter=adapter, **options)


def test_inputs_that_the_model_does_not_take_are_one_message(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_check, "example_inputs", lambda *_, **__: {"input_ids": torch.full((1, 3), 10**6)})
    with pytest.raises(PeftfxError, match="does not take the inputs that were made to compare it: index out of range"):
        merge_directory(folders[0], tmp_path / "out", adapter=folders[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_number_may_be_rounded_and_no_more(dtype: torch.dtype) -> None:
    value = torch.randn(1000) * torch.logspace(-9, 4, 1000)
    value[:3] = torch.tensor([1e30, -float("inf"), 0.0])
    rounded = value.to(dtype).float()
    assert count_wrong(rounded, value, dtype, computed=False) == 0
    step = torch.finfo(dtype)
    further = rounded + rounded.abs().clamp(min=step.tiny) * 1.01 * step.eps
    assert count_wrong(further, value, dtype, computed=False) >= (998 if dtype != torch.float32 else 990)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_large_weight_is_compared_to_its_last_number(dtype: torch.dtype) -> None:
    want = torch.zeros(3000, 1500, dtype=dtype)
    got = want.clone()
    assert count_wrong(got, want, dtype, computed=False) == 0
    got[-1, -1] = 1
    assert count_wrong(got, want, dtype, computed=False) == 1
    assert count_wrong(got[:-1], want, dtype, computed=False) == got[:-1].numel()
    assert count_wrong(torch.tensor(2.0), torch.tensor(1.0), torch.float32, computed=False) == 1


def test_deferred_tensors_are_computed_by_what_reads_them() -> None:
    layer, made = nn.Linear(5, 3), []
    weight = layer.weight.detach().clone()

    def make() -> list[torch.Tensor]:
        made.append(1)
        return [weight * 2]

    x = torch.randn(4, 5)
    want = nn.functional.linear(x, weight * 2, layer.bias)
    layer.weight = nn.Parameter(Deferred.of(make, [weight.to("meta")])[0], requires_grad=False)
    with torch.no_grad(), computing():
        got = layer(x)
    assert len(made) == 1
    torch.testing.assert_close(got, want)
    with torch.no_grad(), computing(), pytest.raises(TypeError, match="what is not made yet"):
        layer.weight.add_(1)


@pytest.mark.parametrize(
    ("got", "off"),
    [
        ([-math.inf, math.nan, 4.0], 0.0),  # GroundingDino's scores of a text's padding are infinite: it was refused
        ([-math.inf, math.nan, 5.0], 0.25),
        ([-math.inf, 0.0, 4.0], math.inf),
        ([0.0, math.nan, 4.0], math.inf),
        ([-math.inf, math.nan, math.nan], math.inf),  # this one hid behind any number
    ],
)
def test_outputs_with_infinities_are_compared(got: list[float], off: float) -> None:
    want = {"first": torch.ones(2), "scores": torch.tensor([-math.inf, math.nan, 4.0])}
    found = merge_check._differences({}, want, {"first": torch.ones(2), "scores": torch.tensor(got)})
    assert max(one.max_rel for one in found) == off
