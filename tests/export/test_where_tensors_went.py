"""The report says where each tensor of an adapter's file went, and the counts add up to the file's."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapted import randomise
from torch import Tensor, nn

import peftfx

SIZE = 8


class Model(nn.Module):
    """Three layers, of which one never runs, and one with a flag alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never, self.sometimes = (nn.Linear(SIZE, SIZE) for _ in range(4))

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        x = torch.relu(self.first(x))
        return self.second(self.sometimes(x) if more else x)


@pytest.mark.parametrize("merge", [True, False])
def test_the_counts_add_up_to_the_file(merge: bool, tmp_path: Path) -> None:
    base, x = Model().eval(), torch.randn(3, SIZE)
    config = peft.LoraConfig(
        r=2, target_modules=["first", "never", "sometimes"], modules_to_save=["second"], bias="lora_only"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        randomise(theirs)
        theirs.save_pretrained(str(tmp_path / "adapter"))
        ours = peftfx.load(base, tmp_path / "adapter", inputs={"x": x, "more": True})
    said: list[str] = []
    report = ours.export(tmp_path / "out", merge=merge, inputs={"x": x}, progress=said.append)
    assert sum(report.tensors.values()) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert report.tensors["merged into weights" if merge else "left apart"] == 2
    assert report.tensors["not run here"] >= 2
    assert report.tensors["never run"] >= 2
    assert any("does not run" in line for line in said)
    assert f"{sum(report.tensors.values())} in the file" in str(report)


def test_a_merge_in_place_takes_what_another_call_runs(tmp_path: Path) -> None:
    base, x = Model().eval(), torch.randn(3, SIZE)
    ours = peftfx.transform(base, peftfx.LoRA(target_modules=["first", "sometimes"]), inputs={"x": x, "more": True})
    randomise(ours)
    want, short = ours(x=x, more=True), ours(x=x)
    assert set(ours.merge().sites) == {"first", "sometimes"}
    merged = ours.remove()
    torch.testing.assert_close(merged(x, more=True), want)
    torch.testing.assert_close(merged(x), short)
