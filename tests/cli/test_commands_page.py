"""Each command as `docs/commands.md` shows it; and each with `--json`, `--quiet` and `--verbose`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import commands_page
import pytest
import typer
from commands_page import CHAPTERS, PAGE, on_page, stable
from support.command import Result, assert_refused

from peftfx.cli.main import app

Command = Callable[..., Result]
NAMES = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
LONG = {"export", "export-adapter", "merge", "train"}  #: what makes something: it is made once more, in another place


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The directory of the page's commands, and what each of them said."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        return folder, commands_page.run(folder)


def test_the_page_has_what_the_commands_say(said: tuple[Path, dict[str, str]]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for step in commands_page.steps():
        kept, now = on_page(step, page), commands_page.shown(step, said[1][step.line])
        assert kept, f"{step.line} is not there: python tests/commands_page.py"
        if step.varies:
            assert len(kept.splitlines()) == len(now.splitlines()) > 1, step.line
        else:
            assert stable(kept) == stable(now), f"{step.line} says something else: python tests/commands_page.py"
    assert commands_page.written(said[1], page).count("    $ ") == page.count("    $ "), "nothing else is there"


def test_the_page_has_every_command() -> None:
    shown = {step.words[0] for own in CHAPTERS.values() for step in own}
    assert sorted(shown) == NAMES
    demo = CHAPTERS["The whole way"][0]
    assert len(on_page(demo, PAGE.read_text(encoding="utf-8")).splitlines()) > 5, "python tests/commands_page.py --demo"


VOICES: dict[str, str] = {
    "convert": "--base base --tuned merged --rank 4 --output {new}",
    "demo": "--output {new}",
    "diff": "monday monday",
    "export": "--base base --adapter monday --view forward --output {new}",
    "export-adapter": "--adapter monday --for graph --no-check --output {new}",
    "info": "onnx",
    "inspect": "base --rules lora@mlp",
    "merge": "--base base --adapter monday --output {new}",
    "methods": "lora",
    "report": "onnx --html {new}.html",
    "run": "onnx --prompt two --max-new-tokens 1",
    "train": "--base base --data rows.jsonl --steps 1 --output {new}",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_the_voice_that_is_asked_for(
    name: str,
    said: tuple[Path, dict[str, str]],
    peftfx: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def demo(output: Path, *, force: bool) -> None:  # the real one takes minutes: `tests/docs/test_demo.py`
        print(f"made {output}")

    monkeypatch.chdir(said[0])
    monkeypatch.setattr("peftfx.demo.demo.run_demo", demo)
    quiet, told = (
        peftfx(name, *VOICES[name].format(new=tmp_path / voice[0]).split(), *voice)
        for voice in (["--quiet"], ["--json", "--verbose"])
    )
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert told.code == 0, told.err
    assert json.loads(told.out)
    assert name not in LONG or "] " in told.err, "stages, on the other stream"
    assert_refused(peftfx(name, *VOICES[name].format(new=tmp_path / "x").split(), "-q", "-v"), "are both given")
