"""Rules as text, such as `"lora(r=8)@attention.query; prefix_tuning(num_virtual_tokens=10)"`.

    rules := rule (';' rule)*
    rule  := method ['(' options ')'] ['@' target]

A method is named by its HF PEFT type in lower case (`prefix_tuning`) or by its class (`PrefixTuning`). Options are the
method's fields, with Python literals as values. A target is an expression of `peftfx.sites.expression`.
"""

from __future__ import annotations

import ast
import dataclasses
import re

from peftfx.contract.method import Method
from peftfx.errors import PeftfxError, pointed
from peftfx.methods import methods, plain, unknown

_STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_REGEX = r"/(?:[^/\\]|\\.)+/"
_NAME = re.compile(r"\s*([A-Za-z][\w-]*)\s*")
_OPTIONS = re.compile(rf"\(((?:{_STRING}|[^'\"()]|\([^()]*\))*)\)\s*")
_TOO_DEEP = (RecursionError, MemoryError)  #: what Python's parser raises for a text that is nested too deeply
_TARGET = re.compile(rf"@((?:{_REGEX}|[^/;])*)")


def parse_rules(text: str) -> tuple[Method, ...]:
    """Return the methods that a text describes.

    Raises:
        PeftfxError: the text cannot be read, or names an unknown method or option; the message names the nearest.
    """
    found: list[Method] = []
    position = 0
    while not found or position < len(text):
        method, position = _rule(text, position)
        found.append(method)
        if position < len(text) and text[position] != ";":
            raise _unreadable(text, position, "expected '@', ';' or the end")
        position += 1
        if not text[position:].strip():
            break
    return tuple(found)


def write_rule(method: Method) -> str:
    """Return a rule as text, which `parse_rules` reads back; options that have their defaults are left out."""
    fields = [f for f in dataclasses.fields(method) if getattr(method, f.name) != _default(f)]
    target = method.target if isinstance(method.target, str) else None
    written = [f"{f.name}={getattr(method, f.name)!r}" for f in fields if f.name != "target" or target is None]
    options = f"({', '.join(written)})" if written else ""
    return f"{method.peft_type.lower()}{options}" + (f"@{target}" if target else "")


def _default(field: dataclasses.Field[object]) -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def method_by_name(name: str) -> type[Method]:
    """Return the method of a HF PEFT type or class name, in any spelling: `prefix_tuning`, `PrefixTuning`."""
    known = {plain(n): cls for cls in methods().values() for n in (cls.peft_type, cls.__name__)}
    if plain(name) not in known:
        raise unknown(name.lower(), "rules", [peft_type.lower() for peft_type in methods()])
    return known[plain(name)]


def _rule(text: str, position: int) -> tuple[Method, int]:
    """Return the rule that begins at a position of the text, and the position of its end."""
    name = _NAME.match(text, position)
    if name is None:
        raise _unreadable(text, position, "expected the name of a method")
    cls, position = method_by_name(name[1]), name.end()
    options: dict[str, object] = {}
    if text.startswith("(", position):
        found = _OPTIONS.match(text, position)
        if found is None:
            raise _unreadable(text, position, "this parenthesis is not closed")
        options, position = _options(found[1], text, found.start(1)), found.end()
    if text.startswith("@", position):
        target = _TARGET.match(text, position)
        assert target is not None
        if not target[1].strip():
            raise _unreadable(text, position, "expected a target behind '@'")
        if "target" in options:
            raise _unreadable(text, position, "the target is given twice")
        options["target"], position = target[1].strip(), target.end()
    return cls.from_options(options), position


def _options(inner: str, text: str, position: int) -> dict[str, object]:
    try:
        call = ast.parse(f"options({inner.strip()})", mode="eval").body
    except SyntaxError as error:
        raise _unreadable(text, position, f"these are no options: {error.msg}") from error
    except (ValueError, *_TOO_DEEP) as error:
        raise _unreadable(text, position, "these are no options") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):  # a comment hides a parenthesis
        raise _unreadable(text, position, "these are no options")
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise _unreadable(text, position, "options are given by name, as in lora(r=8)")
    names = [str(keyword.arg) for keyword in call.keywords]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise _unreadable(text, position, f"{twice} is given twice")
    return {str(keyword.arg): _literal(keyword, text) for keyword in call.keywords}


def _literal(keyword: ast.keyword, text: str) -> object:
    try:
        return ast.literal_eval(keyword.value)
    except _TOO_DEEP as error:
        raise PeftfxError(f"{keyword.arg}: a value that is nested too deeply", text, "write it shorter") from error
    except (ValueError, TypeError) as error:  # TypeError: a list cannot be a key of a dict
        source = _source(keyword.value)
        quoted = f"; write {source!r} if it is a text" if isinstance(keyword.value, ast.Name) else ""
        what = f"{keyword.arg}={source}: not a Python literal"
        raise PeftfxError(what, text, f"a number, a text in quotes, True, a list or a dict{quoted}") from error


def _source(value: ast.expr) -> str:
    try:
        return ast.unparse(value)
    except _TOO_DEEP:
        return "..."


def _unreadable(text: str, position: int, what: str) -> PeftfxError:
    hint = f"{pointed(text, position)}\n  as in lora(r=8)@attention.query; ia3@mlp"
    return PeftfxError(f"cannot read the rules: {what}", "rules", hint)
