"""The messages that users see are those that were read, and the site of the documents builds without a warning."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import peftfx
from peftfx.discovery import method_classes

ROOT = Path(__file__).parents[2]


def test_the_collected_messages_are_those_of_the_sources() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "messages.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_troubleshooting_page_quotes_messages_as_they_are() -> None:
    """The page writes `...`, or a file's name, where a message has a value."""
    said = "\n".join(text for file in sources() for text in texts(ast.parse(file.read_text(encoding="utf-8"))))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(quoted) > 25
    assert [one for one in quoted if any(part.strip() not in said for part in re.split(r"\.\.\.|\S+\.json", one))] == []


def sources() -> Iterator[Path]:
    for folder in ("peftfx", "passes", "export"):
        yield from (file for file in (ROOT / folder).rglob("*.py"))


def texts(tree: ast.Module) -> Iterator[str]:
    """The texts in a file. A value that is filled in is a gap."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_a_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_every_page_is_in_the_sites_list() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert [page.name for page in pages if f": {page.name}\n" not in listed] == []


def test_the_python_page_has_each_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    public = set(peftfx.__all__) - set(method_classes()) - {"__version__"}
    assert public - shown == {"testing"}  # its function `check` is shown
    assert "::: peftfx.methods\n" in page  # the classes of methods


def test_the_python_page_names_what_is_there() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in (line.removeprefix("::: ") for line in page.splitlines() if line.startswith("::: ")):
        pkgutil.resolve_name(f"peftfx.{name.removeprefix('peftfx.')}")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the extra `docs` is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "command-line" / "index.html").is_file()
