"""The methods as data for the command line: names, options, defaults, and documentation from their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass

from peftfx.contract.method import PLACING, Method
from peftfx.contract.sequence import SequenceMethod
from peftfx.methods import methods

_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*)$")


@dataclass(frozen=True)
class Option:
    """One option of a method in a rule: a field of the method's class."""

    name: str
    type: str
    default: str
    text: str


@dataclass(frozen=True)
class Description:
    """The description of a method, read from its class.

    Attributes:
        name: the method's name in a rule.
        title: the first line of the method's docstring.
        kinds: the kinds of sites that the method can act at.
        default_target: the target if a rule has none.
        options: the method's own options, then the options that every method has.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    default_target: str
    options: tuple[Option, ...]

    def to_dict(self) -> dict[str, object]:
        """This description as JSON-ready values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        head = [f"{self.name}: {self.title}", f"acts on {', '.join(self.kinds)}; by default at {self.default_target}"]
        return "\n".join([*head, *(f"  {o.name}={o.default}  ({o.type}) {o.text}".rstrip() for o in self.options)])


def catalogue() -> tuple[Description, ...]:
    """Return the descriptions of all methods, sorted by name."""
    return tuple(describe(cls) for _, cls in sorted(methods().items()))


def describe(cls: type[Method]) -> Description:
    """Return the description of one method."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        texts |= _documented(owner)
    shared = {f.name for f in dataclasses.fields(Method)}
    shown = [f for f in dataclasses.fields(cls) if not (issubclass(cls, SequenceMethod) and f.name in PLACING)]
    fields = sorted(shown, key=lambda f: f.name in shared)
    options = tuple(Option(f.name, str(f.type), _default(f), texts.get(f.name, "")) for f in fields)
    title = (inspect.getdoc(cls) or "").partition("\n")[0]
    return Description(cls.peft_type.lower(), title, tuple(sorted(cls.kinds)), cls.default_target, options)


def _documented(cls: type) -> dict[str, str]:
    """Return what the `Args` section of a class's own docstring says about each name."""
    own = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in own.splitlines():
        entry = _ENTRY.match(line)
        names = entry[1].split(", ") if entry else names
        for name in names:
            found[name] = entry[2] if entry else f"{found[name]} {line.strip()}".rstrip()
    return found


def _default(field: dataclasses.Field[object]) -> str:
    made = field.default_factory
    return repr(field.default if made is dataclasses.MISSING else made())
