"""The command line: whatever is typed ends in exit code 0, or in one message and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.adapter_directories import Adapter, adapters
from fuzz.settle import cases, tree, typed
from fuzz.twins import Base
from fuzz.values import BAD_PATTERNS
from hypothesis import given, settings
from hypothesis import strategies as st

from peftfx import PeftfxError
from peftfx.cli import directories as looking
from peftfx.export import adapter_command, command
from peftfx.export import directories as loading
from peftfx.model.adapted import AdaptedModel
from peftfx.model.plan import make_plan

Typed = Callable[[list[str]], int]
TEXTS = (
    "",
    " ",
    "x",
    "-1",
    "0",
    "3",
    "nan",
    "inf",
    "1e400",
    "5GB",
    "é",
    "x" * 300,
    "--",
    "a=b",
    "=",
    "[]",
    *BAD_PATTERNS,
)
CHOICES = {
    "--task": ("text-generation", "text-classification", "summarization", "text-to-image"),
    "--view": ("forward", "decode", "auto", "dcode"),
    "--dtype": ("fp32", "fp16", "bf16", "fp8"),
    "--engine": ("fast", "torch"),
    "--optimize": ("cpu", "cuda", "none"),
    "--quantize": ("int8", "int4", "int2"),
    "--max-error": ("0.1", "-1"),
    "--opset": ("18", "23", "3", "999"),
    "--max-memory": ("4GB", "1KB", "much"),
    "--batched": ("one=LORA", "a b=LORA", "=LORA", "one="),
    "--slots": ("mlp", "nothing", "("),
    "--adapter": ("LORA", "IA3", "BASE", "SPOILED"),
    "--target": ("mlp", "nothing", "("),
    "--rules": ("lora", "lora(r=0)", "ia3;", "("),
    "--prompt": ("hello",),
    "--text": ("hello", "file.wav"),
    "--image": ("BASE", "nowhere.png"),
    "--top": ("1", "0", "-1"),
    "--max-new-tokens": ("2", "-1", "0"),
    "--temperature": ("0.5", "-1", "nan"),
    "--seed": ("1", "-1", "99999999999999999999999"),
    "--for": ("GRAPH", "BASE"),
    "--combination": ("cat", "linear", "svd"),
    "--output": ("OUTPUT", "x" * 300, "", "BASE"),
    "--base": ("BASE", "LORA", "SPOILED"),
}
FLAGS = ("--force", "--swappable", "--no-merge", "--no-prefix", "--no-check", "--chat", "--json", "--help", "--nothing")
COMMANDS = {
    "export": ["export", "--base", "BASE", "--output", "OUTPUT"],
    "adapted": ["export", "--base", "BASE", "--output", "OUTPUT", "--adapter", "SPOILED"],
    "export-adapter": ["export-adapter", "--adapter", "LORA", "--for", "GRAPH", "--output", "OUTPUT"],
    "inspect": ["inspect", "BASE"],
    "methods": ["methods"],
    "run": ["run", "GRAPH"],
    "none": [],
}
OPTIONS = {
    "export": (
        "--task",
        "--view",
        "--dtype",
        "--engine",
        "--optimize",
        "--quantize",
        "--max-error",
        "--opset",
        "--output",
    ),
    "adapted": ("--task", "--max-memory", "--batched", "--slots", "--adapter", "--base", "--dtype"),
    "export-adapter": ("--adapter", "--for", "--base", "--combination", "--output"),
    "inspect": ("--task", "--target", "--rules"),
    "run": (
        "--prompt",
        "--text",
        "--image",
        "--task",
        "--top",
        "--max-new-tokens",
        "--temperature",
        "--seed",
        "--adapter",
    ),
}


def _option(name: str) -> st.SearchStrategy[list[str]]:
    known = st.sampled_from(CHOICES[name])
    return st.one_of(known, known, st.sampled_from(TEXTS)).map(lambda value: [name, value])


def _words(command: str) -> st.SearchStrategy[list[str]]:
    own = OPTIONS.get(command, tuple(CHOICES))
    extra = st.one_of(
        st.sampled_from(own).flatmap(_option),
        st.sampled_from(own).flatmap(_option),
        st.sampled_from(sorted(CHOICES)).flatmap(_option),
        st.sampled_from(FLAGS).map(lambda flag: [flag]),
        st.sampled_from(TEXTS).map(lambda text: [text]),
    )
    return st.lists(extra, max_size=3).map(
        lambda more: [*COMMANDS[command], *(word for words in more for word in words)]
    )


lines = st.sampled_from(sorted(COMMANDS)).flatmap(_words)


@pytest.fixture
def typing(
    base: Base, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Typed:
    """Type a line. What takes seconds is left out: the model is captured already, and nothing is exported."""
    places = {"BASE": base.root / "base", "LORA": base.root / "lora", "IA3": base.root / "ia3", "GRAPH": exported}
    places |= {"OUTPUT": tmp_path / "out", "SPOILED": tmp_path / "adapter"}

    def captured(model: object, **options: object) -> AdaptedModel:
        base.adapted.remove()  # what the last line left on it
        return base.adapted

    def reached(*arguments: object, **options: object) -> None:
        raise PeftfxError("here the export begins")

    for home in (loading, looking, adapter_command):
        monkeypatch.setattr(home, "bare", captured)
    monkeypatch.setattr(looking, "plan", lambda model, rules: make_plan(model, base.adapted.sites, rules))
    monkeypatch.setattr(command, "export_onnx", reached)
    monkeypatch.setattr(adapter_command, "export_adapter", reached)
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> int:
        line = [word if word not in places else str(places[word]) for word in words]
        line = [word.replace("=LORA", f"={places['LORA']}") for word in line]
        return typed(monkeypatch, capsys, line)

    return run


@cases(quick=30, many=1500)
def test_any_line_is_done_or_refused(cases: settings, typing: Typed, base: Base, tmp_path: Path) -> None:
    shutil.copytree(base.root / "lora", tmp_path / "adapter")
    before = tree(tmp_path)

    @cases
    @given(lines)
    def check(words: list[str]) -> None:
        typing(words)
        assert tree(tmp_path) == before

    check()


@cases(quick=10, many=500)
def test_a_spoiled_adapter_on_the_command_line(cases: settings, typing: Typed, base: Base, tmp_path: Path) -> None:
    @cases
    @given(adapters)
    def check(adapter: Adapter) -> None:
        adapter.write(base.twins, tmp_path / "adapter")
        before = tree(tmp_path)
        assert typing(COMMANDS["adapted"]) == 2
        assert tree(tmp_path) == before

    check()


def test_a_sound_where_texts_are_taken(typing: Typed, exported: Path, tmp_path: Path) -> None:
    """A model that hears is exported and served; the command line has nothing to give it."""
    shutil.copytree(exported, tmp_path / "whisper")
    report = {"model": "WhisperForConditionalGeneration"}
    (tmp_path / "whisper" / "peftfx_report.json").write_text(json.dumps(report), encoding="utf-8")
    assert typing(["run", str(tmp_path / "whisper"), "--text", "file.wav"]) == 2
