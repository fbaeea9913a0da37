"""Read a pass from its text (its `str`): `Merge`, `Remove(name='x')`, `PassManager(passes=(Merge, Evaluate))`.

Options are Python literals, tuples of literals, passes, and the dataclasses of sites that some passes take.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from peftfx.errors import PeftfxError, nearest, pointed
from peftfx.passes.adaptation.evaluate import Evaluate
from peftfx.passes.adaptation.insert import Insert
from peftfx.passes.adaptation.merge import Merge
from peftfx.passes.adaptation.prefill import Prefill
from peftfx.passes.adaptation.remove import Remove
from peftfx.passes.base import Pass
from peftfx.passes.manager import PassManager
from peftfx.passes.optimization.cleanup import Cleanup
from peftfx.passes.optimization.dead_code import Sweep
from peftfx.passes.optimization.fuse import Fuse
from peftfx.passes.patterns.probe import Probe
from peftfx.passes.patterns.rewrite import Rewrite
from peftfx.passes.slots.by_row import ByRow
from peftfx.passes.slots.open import Open
from peftfx.patterns.pattern import known_patterns
from peftfx.sites.site import Call, HeadedSite, Heads, Part

_KNOWN = (Cleanup, Evaluate, Fuse, Insert, Merge, Prefill, Probe, Remove, Rewrite, Sweep, ByRow, Open, PassManager)
_RECORDS = (Call, HeadedSite, Heads, Part)  #: the classes of options, besides literals
_TOO_DEEP = (RecursionError, MemoryError)  #: the errors of Python's parser for text that is nested too deeply


def parse_pass(text: str) -> Pass:
    """Make the pass that `text` describes. Passes of other packages are known once they are imported.

    Raises:
        PeftfxError: the text cannot be read, or names an unknown pass or option; the message names the nearest.
    """
    try:
        made = _value(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, *_TOO_DEEP) as error:
        raise _unreadable(text, 0, "this is no pass") from error
    if not isinstance(made, Pass):
        raise _unreadable(text, 0, "expected the name of a pass")
    return made


def _value(node: ast.expr, text: str) -> object:
    if isinstance(node, ast.Name):
        return _made(node.id, {}, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise _unreadable(text, node.col_offset, "options are given by name, as in Remove(name='x')")
        options = {str(keyword.arg): _value(keyword.value, text) for keyword in node.keywords}
        if lost := next((name for name, value in options.items() if value is ...), None):
            what = f"{lost} of {node.func.id} is no text: `...` stands for it"
            raise PeftfxError(f"cannot read the pass: {what}", text, "make this pass in Python")
        return _made(node.func.id, options, text)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item, text) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, *_TOO_DEEP) as error:
        raise _unreadable(text, node.col_offset, "this is neither a literal nor a pass") from error


def _made(name: str, options: Mapping[str, object], text: str) -> object:
    known: dict[str, Any] = {cls.__name__: cls for cls in [*_KNOWN, *_RECORDS]} | {
        cls.__name__: cls for cls in _below(Pass)
    }
    patterns = {pattern.name: pattern for pattern in known_patterns()}
    if name in patterns and name not in known and not options:
        return patterns[name]
    if name not in known:
        raise PeftfxError(f"there is no pass {name!r}", text, nearest(name, known))
    fields = {field.name: field for field in dataclasses.fields(known[name]) if field.init}
    if unknown := next((option for option in options if option not in fields), None):
        raise PeftfxError(f"{name} has no option {unknown!r}", text, nearest(unknown, fields))
    needed = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := next((option for option in needed if option not in options), None):
        raise PeftfxError(f"{name} needs the option {missing!r}", text, f"{name}({missing}=...)")
    return known[name](**options)


def _below(cls: type[Any]) -> Iterator[type[Any]]:
    for own in cls.__subclasses__():
        yield own
        yield from _below(own)


def _unreadable(text: str, position: int, what: str) -> PeftfxError:
    return PeftfxError(f"cannot read the pass: {what}", "pass", f"{pointed(text, position)}\n  as in Remove(name='x')")
