"""Prose is spelled the British way; names are spelled as those who own them spell them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: American beginnings of words, but for the field's own names: a tokenizer, an optimizer, ONNX's initializers.
AMERICAN = re.compile(
    r"\b(de|re)?(quantiz|normaliz|parametriz|summariz|regulariz|generaliz|factoriz|recogniz|minimiz|maximiz|materializ"
    r"|serializ|penaliz|specializ|analyz|organiz|initializ(?!ers?\b)|optimiz(?!ers?\b)|tokeniz(?!ers?\b))\w*"
    r"|\b(behavior|color|favor|center|labeled|labeling|modeling|canceled|artifact|gray)s?\b",
    re.IGNORECASE,
)
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])


def prose(page: str) -> str:
    """A page without its code: blocks, spans, links, options and names in quotes."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r"^ {4}.*$", "", page, flags=re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>|--[a-z-]+|[^\s`]+_[^\s`]*|https?://\S+|\S*/\S*", "", page)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_are_spelled_one_way(page: Path) -> None:
    assert [found[0] for found in AMERICAN.finditer(prose(page.read_text(encoding="utf-8")))] == []


def docstrings() -> Iterator[tuple[str, str]]:
    """Each docstring of the package, and where it is."""
    for folder in ("peftfx", "passes", "export"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    # The name ahead of a colon is a file's, a field's or an argument's.
                    yield path.relative_to(ROOT).as_posix(), re.sub(r"^ *[\w, ]+:", "", text, flags=re.MULTILINE)


def test_docstrings_are_spelled_one_way() -> None:
    wrong = [(where, found[0]) for where, text in docstrings() for found in AMERICAN.finditer(prose(text))]
    assert wrong == []


def test_messages_are_spelled_one_way() -> None:
    lines = (ROOT / "tests" / "golden" / "messages.txt").read_text(encoding="utf-8")
    text = "\n".join(
        re.sub(r"\{[^}]*\}|^\S+:", "", line).replace("quantize", "`quantize`") for line in lines.splitlines()
    )
    assert [found[0] for found in AMERICAN.finditer(prose(text))] == []
