"""Files of Python that comments, docstrings and pages name are there: a file that moves takes its name along."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from house.structure import ROOT

#: Examples of names, and files of other projects.
ELSEWHERE = {"file.py", "my_rules.py", "tests/test_custom_models.py", "sentence_transformer/modules/pooling.py"}
FOLDERS = ("peftfx", "passes", "export", "tests", "docs", "benchmarks", "examples")


def texts() -> Iterator[Path]:
    """The sources and pages; a page of results quotes the files of transformers."""
    for folder in FOLDERS:
        yield from (ROOT / folder).rglob("*.py")
        yield from (path for path in (ROOT / folder).rglob("*.md") if path.name != "models.md")
    yield from ROOT.glob("*.md")


def test_named_files_are_there() -> None:
    there = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    there |= {f"peftfx/{name}" for name in there if name.startswith(("passes/", "export/"))}  # as they are installed
    ends = {name[at:] for name in there for at in (0, *(i + 1 for i, c in enumerate(name) if c == "/"))}
    lost = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts()
        for name in re.findall(r"`((?:\w+/)*\w+\.py)`", path.read_text(encoding="utf-8"))
        if name not in ELSEWHERE and name not in ends
    ]
    assert lost == []
