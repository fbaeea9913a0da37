"""An adapter of several tasks on the command line: one of them merged or exported, or all as rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.command import Result, assert_refused
from torch import Tensor

import peftfx
from peftfx import runtime

Command = Callable[..., Result]
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
TASKS = torch.tensor([0, 1, 2])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """A base, a Poly of three tasks on it, and what each row gives by its task."""
    root = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, num_hidden_layers=1, **SIZE)).eval()
    base.save_pretrained(root / "base")
    adapted = peftfx.transform(base, peftfx.Poly(r=2, n_tasks=3, n_skills=2))
    randomise(adapted)
    adapted.save_pretrained(root / "poly")
    with torch.no_grad():
        return root / "base", root / "poly", adapted(input_ids=IDS, task_ids=TASKS).logits


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_one_task_is_merged(made: tuple[Path, Path, Tensor], peftfx: Command, tmp_path: Path) -> None:
    base, poly, want = made
    done = peftfx("merge", "--base", base, "--adapter", poly, "--task-id", "1", "--output", tmp_path / "out")
    assert done.code == 0, done.err
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(IDS[1:2]).logits, want[1:2], atol=1e-5, rtol=1e-5)
    out = ("--output", tmp_path / "none")
    assert_refused(peftfx("merge", "--base", base, "--adapter", poly, *out), "take one (--task-id N")
    assert_refused(peftfx("merge", "--base", base, "--adapter", poly, "--task-id", "3", *out), "has no task 3")
    assert_refused(peftfx("merge", "--base", base, "--task-id", "1", *out), "no adapter is given")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [False, True])
def test_one_is_exported_or_all_are_rows(
    rows: bool, made: tuple[Path, Path, Tensor], peftfx: Command, tmp_path: Path
) -> None:
    base, poly, want = made
    how = ["--batched", f"p={poly}"] if rows else ["--adapter", poly, "--task-id", "2"]
    done = peftfx("export", "--base", base, *how, "--view", "forward", "--output", tmp_path / "out")
    assert done.code == 0, done.err
    served, mask = runtime.load(tmp_path / "out"), torch.ones_like(IDS)
    if not rows:
        got = served(input_ids=IDS[2:], attention_mask=mask[2:]).logits
        torch.testing.assert_close(got, want[2:], atol=1e-5, rtol=1e-5)
        return
    assert json.loads((tmp_path / "out" / "peftfx_adapters.json").read_text())["adapters"] == ["p_0", "p_1", "p_2"]
    got = served(input_ids=IDS, attention_mask=mask, adapter_ids=served.adapter_ids(["p_0", "p_1", "p_2"])).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
