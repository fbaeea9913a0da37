"""Families are types: nobody asks an object of which family it is, or a rule which method it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from house.structure import PACKAGES, ROOT

from peftfx.contract.placement import Placement
from peftfx.sites.site import Site

FAMILIES = {"WeightMethod", "AttentionMethod", "SequenceMethod", "OverrideMethod", "PromptMethod"}
FAMILIES |= {cls.__name__ for cls in (*Placement.__subclasses__(), *Site.__subclasses__())}
#: Laws draw parts for weight methods alone; the demo tells its trials; the second arithmetic goes by published names;
#: single files hold plain LoRAs and nothing else.
SANCTIONED = {
    "peftfx/testing/cases.py",
    "peftfx/demo/generation.py",
    "export/verification/eager/published.py",
    "peftfx/adapters/single_files/writing.py",
}


def methods() -> set[str]:
    """The classes of methods, by the module that each has."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "peftfx/methods").glob("*.py"))
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def asked(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """The lines of a file that call `isinstance` with one of these classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            found = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & names
            if found:
                yield f"{node.lineno}: {', '.join(sorted(found))}"


def test_no_code_asks_for_a_family_or_a_method() -> None:
    names = FAMILIES | methods()
    assert {"LoRA", "PrefixTuning", "WeightPlacement", "AttentionSite"} <= names
    found = []
    for package in PACKAGES.values():
        for file in (ROOT / package).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            if name not in SANCTIONED and not name.startswith("peftfx/methods/"):
                found += [f"{name}:{line}" for line in asked(ast.parse(file.read_text(encoding="utf-8")), names)]
    assert found == []
