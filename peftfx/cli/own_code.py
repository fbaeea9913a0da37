"""A user's own code on the command line: modules that have methods and patterns, and passes by their names."""

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
    """A module by its name, from where Python looks, and from the working directory; a file's name loses its ending.

    Raises:
        PeftfxError: there is none, or it fails.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    named = name.removesuffix(".py").replace(os.sep, ".")
    try:
        return importlib.import_module(named)
    except PeftfxError:
        raise
    except Exception as error:  # whatever the user's own code raises
        what = f"cannot import the module: {type(error).__name__}: {first_line(error)}"
        raise PeftfxError(what, name, "name a module as Python imports it, from here or installed") from error


def passes_named(texts: Sequence[str]) -> tuple[Pass, ...]:
    """Passes, each `module:NAME`: an object that is one, or a class that needs no options.

    Raises:
        PeftfxError: there is none of this name, or it is no pass.
    """
    return tuple(_pass_named(text) for text in texts)


def _pass_named(text: str) -> Pass:
    from peftfx.passes.base import Pass

    name, _, attribute = text.partition(":")
    if not name or not attribute:
        raise PeftfxError("a pass is given as MODULE:NAME", text, "as in --pass my_rules:TANH, for TANH in my_rules.py")
    module = import_module(name)
    found = getattr(module, attribute, None)
    if found is None:
        known = [own for own, value in vars(module).items() if isinstance(value, Pass)]
        hint = nearest(attribute, known) or f"its passes are {', '.join(known) or 'none'}"
        raise PeftfxError(f"the module {name} has no {attribute!r}", text, hint)
    if isinstance(found, type) and issubclass(found, Pass):
        try:
            found = found()
        except TypeError as error:
            what = f"{attribute} needs options: {first_line(error)}"
            hint = f"make it in the module, as in MINE = {attribute}(...), and name that"
            raise PeftfxError(what, text, hint) from error
    if not isinstance(found, Pass):
        what = f"{attribute} is a {type(found).__name__}, and no pass"
        raise PeftfxError(what, text, "see docs/patterns.md and docs/writing-a-pass.md")
    return found
