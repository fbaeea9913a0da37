"""Import a user's own code for the command line: modules with methods and patterns, and passes by their names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftfx.errors import PeftfxError, first_line, nearest

if TYPE_CHECKING:
    from types import ModuleType

    from peftfx.passes.base import Pass


def import_module(name: str) -> ModuleType:
    """Import a module by its name, also from the working directory. The name may end in `.py`.

    Raises:
        PeftfxError: the module does not exist, or fails.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    named = name.removesuffix(".py").replace(os.sep, ".")
    try:
        return importlib.import_module(named)
    except PeftfxError:
        raise
    except Exception as error:  # the user's own code may raise any error
        what = f"cannot import the module: {type(error).__name__}: {first_line(error)}"
        raise PeftfxError(
            what, name, "name a module that Python can import from here, or an installed module"
        ) from error


def passes_named(texts: Sequence[str]) -> tuple[Pass, ...]:
    """Return the passes named by `module:NAME`, each an object, or a class that needs no options.

    Raises:
        PeftfxError: the name does not exist, or is not a pass.
    """
    return tuple(_pass_named(text) for text in texts)


def _pass_named(text: str) -> Pass:
    from peftfx.passes.base import Pass

    name, _, attribute = text.partition(":")
    if not name or not attribute:
        hint = "pass, for example, --pass my_rules:TANH for TANH in my_rules.py"
        raise PeftfxError("a pass is named as MODULE:NAME", text, hint)
    module = import_module(name)
    found = getattr(module, attribute, None)
    if found is None:
        known = [own for own, value in vars(module).items() if _is_pass(value, module)]
        hint = nearest(attribute, known) or f"its passes: {', '.join(known) or 'none'}"
        raise PeftfxError(f"the module {name} has no {attribute!r}", text, hint)
    if isinstance(found, type) and issubclass(found, Pass):
        try:
            found = found()
        except TypeError as error:
            what = f"{attribute} needs options: {first_line(error)}"
            hint = f"make an object in the module, as in MINE = {attribute}(...), and name MINE"
            raise PeftfxError(what, text, hint) from error
    if not isinstance(found, Pass):
        what = f"{attribute} is a {type(found).__name__}, not a pass"
        raise PeftfxError(what, text, "see docs/patterns.md and docs/writing-a-pass.md")
    return found


def _is_pass(value: object, module: ModuleType) -> bool:
    """Say whether a value of a module is a pass, or a class of passes that the module itself defines."""
    from peftfx.passes.base import Pass

    if isinstance(value, type):
        return issubclass(value, Pass) and value.__module__ == module.__name__
    return isinstance(value, Pass)
