"""The methods, one file each. A new file in this folder that defines a `Method` adds a method.

A method of another package is added by `register`, or by an entry point of the group `peftfx.methods` in that package,
which names the method's class. Then rules as text, the command line and files know the method by its `peft_type`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from peftfx.contract.completeness import refuse_incomplete
from peftfx.contract.method import Method
from peftfx.errors import PeftfxError, first_line, nearest, warn

GROUP = "peftfx.methods"
_M = TypeVar("_M", bound=type[Method])

_registered: dict[str, type[Method]] = {}
#: HF PEFT's types, so that a type which peftfx lacks is not treated as a spelling mistake.
_PEFT = frozenset(
    [
        "ADALORA",
        "ADAMSS",
        "ADAPTION_PROMPT",
        "BEFT",
        "BOFT",
        "C3A",
        "CARTRIDGE",
        "CPT",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LILY",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "MULTITASK_PROMPT_TUNING",
        "OFT",
        "OSF",
        "PEANUT",
        "POLY",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "PSOFT",
        "PVERA",
        "P_TUNING",
        "RANDLORA",
        "ROAD",
        "SHADOW",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
        "XLORA",
    ]
)


#: HF PEFT's types that peftfx refuses, and why.
_REFUSED = {
    "XLORA": "mixes trained LoRAs by what a first pass of the whole model gives for this very input, which no one "
    "graph computes; make its LoRAs active together (set_adapter), or one at a time",
    "SHADOW": "runs a second network of its own beside the whole model, and acts at no module of it; train a LoRA in "
    "its place, or export what peft runs yourself",
}


def methods() -> dict[str, type[Method]]:
    """Return all methods by their HF PEFT type (`LORA`): of this folder, of other packages, and registered ones."""
    return {**_own(), **_installed(), **_registered}


def register(cls: _M) -> _M:
    """Register a method by its `peft_type`, for rules, the command line and files. Usable as a decorator.

    A class that is defined again, as in a notebook, replaces the earlier class.

    Args:
        cls: the class of a `Method`, which is returned.

    Raises:
        PeftfxError: the class lacks a member of the contract, or another method has its name.

    Examples:
        >>> @peftfx.register
        ... @dataclass(frozen=True, kw_only=True)
        ... class SmallLoRA(peftfx.LoRA):
        ...     peft_type: ClassVar[str] = "SMALL_LORA"
        ...     r: int = 2
        >>> adapted = peftfx.transform(model, "small_lora@attention.query")
    """
    refuse_incomplete(cls)
    if taken := _taken(cls, methods().values()):
        raise PeftfxError(f"{cls.__name__} has a peft_type that is taken: {taken}", "peft_type", "give it another")
    _registered[cls.peft_type] = cls
    return cls


@contextlib.contextmanager
def forgetting_registered() -> Iterator[None]:
    """Forget, at the end of the `with` block, what it has registered."""
    before = dict(_registered)
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(before)


def method_named(peft_type: str) -> type[Method]:
    """Return the method of this HF PEFT type. For an unknown type the error names the known types."""
    known = methods()
    if peft_type not in known:
        raise unknown(peft_type, "peft_type", known)
    return known[peft_type]


def unknown(name: str, where: str, known: Iterable[str]) -> PeftfxError:
    """Return the error that there is no method of this name, with what can be done."""
    if reason := _REFUSED.get(name.upper()):
        why, _, hint = reason.partition("; ")
        return PeftfxError(f"peftfx refuses HF PEFT's method {name.upper()}: it {why}", where, hint)
    if name.upper() in _PEFT and name.upper() not in methods():
        what = f"HF PEFT has the method {name.upper()}, and peftfx does not"
        hint = "merge it with peft where peft can, and export the base; or write it as a method of your own"
        return PeftfxError(what, where, f"{hint} (docs/writing-a-method.md)")
    own = f"import a method of your own first (--import MODULE, peftfx.register, or an entry point, {GROUP!r})"
    near = nearest(name, known) or nearest(name.upper(), known)
    hint = f"{near}; {own}" if near else f"{own}; methods that peftfx knows: {', '.join(sorted(known))}"
    return PeftfxError(f"unknown method {name!r}", where, hint)


def plain(name: str) -> str:
    """Return a method's type or class name in the form that rules compare: `prefix_tuning` is `PrefixTuning`."""
    return name.replace("_", "").replace("-", "").lower()


@functools.cache
def _own() -> dict[str, type[Method]]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {cls.peft_type: cls for module in modules for cls in _methods_in(vars(module), module.__name__)}


def _methods_in(names: dict[str, object], home: str) -> Iterator[type[Method]]:
    """Yield a module's own classes that define `peft_type`; a base class of several methods does not define it."""
    for value in names.values():
        own = isinstance(value, type) and issubclass(value, Method) and value.__module__ == home
        if own and "peft_type" in vars(value):
            yield value  # type: ignore[misc]


@functools.cache
def _installed() -> dict[str, type[Method]]:
    """Return the methods of other packages. A method that cannot be loaded gives a warning, and stops no other."""
    found: dict[str, type[Method]] = {}
    for point in entry_points(group=GROUP):
        try:
            cls = _loaded(point)
            if taken := _taken(cls, [*_own().values(), *found.values()]):
                raise PeftfxError(f"its name is taken: {taken}")
            found[cls.peft_type] = cls
        except Exception as error:
            package = point.dist.name if point.dist is not None else point.module
            warn(f"the method {point.name} of the package {package} is left out: {first_line(error)}")
    return found


def _loaded(point: EntryPoint) -> type[Method]:
    cls = point.load()
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise PeftfxError(f"{point.value} is not a class of a Method")
    refuse_incomplete(cls)
    return cls


def _taken(cls: type[Method], others: Iterable[type[Method]]) -> str:
    """Return which other method has one of this class's names, in words; empty if none has."""
    names = {plain(cls.peft_type), plain(cls.__name__)}
    for other in others:
        same = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
        if not same and names & {plain(other.peft_type), plain(other.__name__)}:
            return f"{other.peft_type} is {other.__module__}.{other.__qualname__}"
    return ""
