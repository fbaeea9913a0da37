"""The options of all commands that decide how they speak: in words or JSON, with progress or quietly."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from peftfx.cli.own_code import import_module
from peftfx.errors import PeftfxError


@dataclasses.dataclass
class Voice:
    """The way in which the running command speaks.

    Attributes:
        as_json: print results and errors as JSON on stdout.
        quiet: print only errors, warnings, and JSON if `as_json` is set.
        verbose: also print single steps, the output of other libraries, and the causes of an error.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False


VOICE = Voice()  #: the voice of the running command

_OPTIONS = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print the result as JSON.")],
    "quiet": Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no progress and no result; warnings and errors stay.")
    ],
    "verbose": Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show single steps, messages of other libraries, and the cause of an error."
        ),
    ],
}


_MODULES = Annotated[
    list[str] | None,
    typer.Option("--import", help="Python module with methods or patterns to import first; repeat for more."),
]


def spoken(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the voice's options, and with `--import` for the user's modules."""
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name in _OPTIONS:
            setattr(VOICE, name, given.pop(name))
        modules = given.pop("modules")
        if VOICE.quiet and VOICE.verbose:
            VOICE.as_json = False
            raise PeftfxError("--quiet and --verbose are both given", "--quiet, --verbose", "pass one of them")
        for name in modules or ():
            import_module(name)
        command(**given)

    kinds = [("modules", None, _MODULES), *((name, False, kind) for name, kind in _OPTIONS.items())]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, default, kind in kinds
    ]
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own.parameters.values(), *more)}
    return run


def tell(result: object, words: object = None) -> None:
    """Print a result: as JSON if asked for, otherwise in words, by default the result's own."""
    if VOICE.as_json:
        print(json.dumps(json_ready(result), indent=2, default=str))
    elif not VOICE.quiet:
        print(result if words is None else words)


def tell_error(error: PeftfxError) -> None:
    """Print an error on stderr, and also as JSON on stdout if asked for."""
    if VOICE.as_json:
        told = {"what": error.what, "where": error.where, "hint": error.hint, "exit_code": error.exit_code}
        print(json.dumps({"error": told}, indent=2))
    print(f"peftfx: error: {error}", file=sys.stderr)
    cause = error.__cause__
    while VOICE.verbose and cause is not None:
        print(f"  caused by {type(cause).__name__}: {cause}", file=sys.stderr)
        cause = cause.__cause__


def json_ready(value: object) -> Any:
    """Convert a result to values for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_ready(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_ready(own) for key, own in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_ready(own) for own in value]
    return str(value) if isinstance(value, Path) else value
