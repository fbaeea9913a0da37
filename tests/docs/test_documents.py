"""What the documents show runs: python and bash blocks, in order, in one namespace and one directory a document.

A bash line `peftfx ...` runs the command line; behind `# exits N` it must exit with N. Lines of other programs and
`peftfx demo`, which has tests of its own, are left alone.
"""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.few import but_further

from peftfx.cli.main import main
from peftfx.method import WeightMethod

ROOT = Path(__file__).parents[2]
#: Pages whose blocks take longer than those of the first pages that a user reads: left to `pytest -m further`.
LONG = ("writing-a-method.md", "deploying.md", "soft-prompts.md", "llama-adapter.md", "patterns.md")
_FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document and the line that its text begins at."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> Iterator[Block]:
    """The blocks of a document that are in a language."""
    text = document.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        yield Block(found["language"], found["text"], text.count("\n", 0, found.start("text")))


def documents() -> list[Path]:
    """Every document that shows code."""
    candidates = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in candidates if any(b.language == "python" for b in blocks(path))]


def commands(block: Block) -> Iterator[tuple[list[str], int]]:
    """The arguments of each `peftfx` command of a bash block, and its exit code."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition("  #")
        arguments = shlex.split(command)
        if arguments[:1] == ["peftfx"] and arguments[1:] != ["demo"]:
            expected = re.search(r"exits (\d)", comment)
            yield arguments[1:], int(expected[1]) if expected else 0


@pytest.mark.parametrize(
    "document",
    but_further({path for path in documents() if path.name in LONG}, documents()),
    ids=lambda path: path.name,
)
def test_every_block_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("document")  # dataclasses look up the module that they are in
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(document):
        if block.language == "python":
            # The line numbers of a traceback are the document's.
            code = compile("\n" * block.line + block.text, str(document), "exec", dont_inherit=True)
            exec(code, vars(module))
        elif block.language == "bash":
            for arguments, expected in commands(block):
                assert run(arguments, monkeypatch) == expected, f"peftfx {shlex.join(arguments)}"


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the command line, run in this process: another would take seconds to import torch."""
    monkeypatch.setattr("sys.argv", ["peftfx", *arguments])
    try:
        main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def test_the_optional_members_of_a_method_are_there() -> None:
    rows = re.findall(r"^   \| (`.+?) \| ", (ROOT / "docs" / "writing-a-method.md").read_text(encoding="utf-8"), re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)", row)]
    assert len(named) > 30
    assert [name for name in named if not hasattr(WeightMethod, name)] == []


@pytest.mark.parametrize("document", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    links = re.findall(r"(?:\]\(|src=\")(?!https?:|#)([^)\"#]+)", document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]
