"""One word for one thing: no public name is defined in two modules."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from house.structure import PACKAGES, ROOT

#: What each format of quantised weights has, in a module of its own: a protocol, read by name.
FORMAT = {"MARKS", "NAMES", "read"}
#: Each kind of `peftfx run` has a module of its own with this function.
KINDS_OF_RUNS = {"run"}
#: The names of a method's parameters: constants of its own file, which nothing else reads.
PARAMETERS = "peftfx/methods"
#: `peftfx.load` gives a torch model, `peftfx.runtime.load` one in ONNX Runtime: people have either in sight.
LOADERS = {"load"}
#: `torch.ops.aten` and `torch.ops.onnx`, under torch's own short names.
SHORT = {"aten", "onnx"}

EXCEPTIONS = FORMAT | KINDS_OF_RUNS | LOADERS | SHORT


def defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module's own code binds, imports left out."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def test_no_public_name_is_defined_in_two_modules() -> None:
    modules: dict[str, set[str]] = defaultdict(set)
    for folder in PACKAGES.values():
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent.name == "commands":  # a function there has the name of its command
                continue
            for name in defined(ast.parse(path.read_text(encoding="utf-8"))):
                if not name.startswith("_") and not (name.isupper() and path.is_relative_to(ROOT / PARAMETERS)):
                    modules[name].add(path.relative_to(ROOT).as_posix())
    twice = {name: sorted(found) for name, found in modules.items() if len(found) > 1}
    assert {n: f for n, f in twice.items() if n not in EXCEPTIONS} == {}
    assert {*twice} == EXCEPTIONS  # an exception that nothing needs goes


def test_no_module_imports_anothers_private_names() -> None:
    """A name with an underscore is its own module's."""
    taken = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {alias.name}"
        for folder in PACKAGES.values()
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftfx")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert taken == []
