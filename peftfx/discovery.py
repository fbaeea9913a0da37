"""The search for methods in the text of their files, without imports, so that `dir(peftfx)` is cheap."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.resources import files


def method_classes() -> dict[str, str]:
    """Return the class name of each method in `peftfx/methods/`, with the module that defines the class.

    A method is a class that defines `peft_type`.
    """
    return dict(sorted(_classes()))


def _classes() -> Iterator[tuple[str, str]]:
    for file in files("peftfx").joinpath("methods").iterdir():
        if file.name.endswith(".py") and file.name != "__init__.py":
            tree = ast.parse(file.read_text(encoding="utf-8"))
            classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
            for node in classes:
                if not node.name.startswith("_") and any(_says_type(line) for line in node.body):
                    yield node.name, f"peftfx.methods.{file.name.removesuffix('.py')}"


def _says_type(line: ast.stmt) -> bool:
    targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == "peft_type" for target in targets)
