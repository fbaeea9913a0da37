"""Every message that a user can see, collected from the sources into `tests/golden/messages.txt`.

    python tests/messages.py            # write the file anew
    python tests/messages.py --check    # exit 1 where the file is not what the sources have

A message is what `PeftfxError`, `CaptureError`, `VerificationError` or `warn` is called with. A line has the module,
what is wrong, where, and what to do; braces stand for what is known when it is raised.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "messages.txt"
FOLDERS = ("peftfx", "passes", "export")
RAISED = frozenset({"PeftfxError", "CaptureError", "VerificationError", "StateError", "warn"})


@dataclass(frozen=True)
class Message:
    """One message: the module that has it, and its parts, in order: what, where, hint."""

    module: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}: " + " | ".join(self.parts)


def messages() -> Iterator[Message]:
    """All of them, by module, in the order of the source."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "passes" not in path.parts[:-1] or folder != "peftfx":
                yield from _of(path)


def _of(path: Path) -> Iterator[Message]:
    module = path.relative_to(ROOT).with_suffix("").as_posix()
    for scope in ast.walk(tree := ast.parse(path.read_text(encoding="utf-8"))):
        for child in ast.iter_child_nodes(scope):
            child.parent = scope  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in RAISED:
            names = _assigned(node)
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield Message(module, tuple(_text(value, names) for value in given if not isinstance(value, ast.Starred)))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _assigned(call: ast.Call) -> dict[str, ast.expr]:
    """What the function around a call has put into names, the last value ahead of the call."""
    scope: ast.AST = call
    while not isinstance(scope, ast.FunctionDef | ast.Module):
        scope = scope.parent  # type: ignore[attr-defined]
    found = {}
    ahead = (node for node in ast.walk(scope) if isinstance(node, ast.Assign) and node.lineno <= call.lineno)
    for node in sorted(ahead, key=lambda node: node.lineno):  # a walk gives inner blocks last, wherever they are
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            found |= {one.id: value for one, value in pairs if isinstance(one, ast.Name)}
    return found


def _known_later(node: ast.expr) -> str:
    """Code in braces, with one kind of quotes: the kind inside an f-string depends on the version of Python."""
    return "{" + ast.unparse(node).replace("'", '"') + "}"


def _text(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """A text as it is written; what is only known when it is raised in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else _known_later(part.value) for part in node.values
        )  # type: ignore[attr-defined]
    if isinstance(node, ast.Name) and isinstance(
        names.get(node.id), ast.Constant | ast.JoinedStr | ast.IfExp | ast.BinOp | ast.BoolOp
    ):
        return _text(names[node.id], {name: value for name, value in names.items() if name != node.id})
    if isinstance(node, ast.IfExp):
        return f"[{_text(node.body, names)} / {_text(node.orelse, names)}]"
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return f"[{' / '.join(_text(value, names) for value in node.values)}]"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names) + _text(node.right, names)
    return _known_later(node)


def collected() -> str:
    """What the file has to hold."""
    return "\n".join(dict.fromkeys(map(str, messages()))) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        old, new = (set(text.splitlines()) for text in (GOLDEN.read_text(encoding="utf-8"), collected()))
        print("\n".join([*(f"- {line}" for line in sorted(old - new)), *(f"+ {line}" for line in sorted(new - old))]))
        sys.exit("read these, then run: python tests/messages.py" if old != new else 0)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(collected(), encoding="utf-8")
    print(f"{GOLDEN.relative_to(ROOT)}: {collected().count(chr(10))} messages")
