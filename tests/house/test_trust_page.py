"""`docs/trust.md` names tests that exist."""

from __future__ import annotations

import re

from house.structure import ROOT

PAGE = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_is_there() -> None:
    """A name without a file is in the file that was named before it in the same line."""
    found = 0
    for line in PAGE.splitlines():
        text = ""
        for file, names in re.findall(r"`((?:[\w/]+\.py)?)((?:::\w+)*)`", line):
            if file:
                path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / "trust" / file
                assert path.is_file(), file
                text = path.read_text(encoding="utf-8")
            elif not names or not text:
                continue
            for name in names.split("::")[1:]:
                found += 1
                assert re.search(rf"(?:def|class) {name}\b", text), (file, name)
    assert found > 30
