"""Checks that a method fulfils the contract, and that its members give what the contract says.

An error names the method, the member, and what the contract says that the member gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from peftfx.errors import PeftfxError, first_line, shown

_CONTRACT = "peftfx.contract."
_DEFAULTS = ("peftfx.contract.method", "peftfx.contract.weight")  #: the modules whose members are only defaults
_SAID = {
    "peft_type": 'its name in files and rules, as "ROW_SCALE"',
    "default_target": 'where it acts if a rule does not say, as "attention.value | mlp.up"',
    "kinds": "the kinds of sites it acts at: derive from WeightMethod, AttentionMethod, PromptMethod or OverrideMethod",
}
_BARE = (AttributeError, KeyError, TypeError, NotImplementedError)  #: the errors that Python raises in unfinished code


def refuse_incomplete(cls: type) -> None:
    """Refuse a method's class that lacks a member of the contract.

    Raises:
        PeftfxError: names all members that the class lacks, each with what the member must give.
    """
    lacking = [f"{name}: {_said(cls, name)}" for name in sorted(getattr(cls, "__abstractmethods__", ()))]
    if _is_default(cls, "fold") and _is_default(cls, "unfoldable"):
        lacking.append(f"fold: {_said(cls, 'fold')}; or unfoldable: {_said(cls, 'unfoldable')}")
    lacking += [f"{name}: {text}" for name, text in _SAID.items() if not getattr(cls, name, None)]
    if lacking:
        hint = "docs/writing-a-method.md has a whole example"
        raise PeftfxError(
            f"{cls.__name__} is not a complete method; it lacks\n  " + "\n  ".join(lacking), _home(cls), hint
        )
    fields = [name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
    if fields and "__dataclass_params__" not in vars(cls):
        what = f"{cls.__name__} has options ({', '.join(fields)}) but is not a dataclass: they would be ignored"
        raise PeftfxError(what, _home(cls), "write @dataclass(frozen=True, kw_only=True) above the class")


class Frozen(Protocol):
    """An object that says which of its tensors are constants: a method."""

    def is_constant(self, name: str, value: Tensor) -> bool: ...


def refuse_parameters(
    method: Frozen,
    where: str,
    made: object,
    keys: object = None,
    member: str = "init",
    beside: Collection[str] = (),
) -> None:
    """Refuse a member's result that is not parameters, or that has trained tensors without a key.

    Args:
        made: the member's result.
        keys: the result of `keys`, where the method has files of its own.
        beside: names of shared tensors, which `keys` may name too.
    """
    if not isinstance(made, Mapping) or not all(map(_is_parameter, made.items())):
        raise _gave(type(method), member, where, shown(made))
    if taken := next((name for name in made if hasattr(nn.Module, name)), ""):
        what = (
            f"{type(method).__name__}.{member} calls a tensor {taken!r}, which every torch module has an attribute of"
        )
        raise PeftfxError(what, where, "give it another name")
    if keys is not None:
        refuse_keys(method, "keys", where, keys, made, beside)


def _is_parameter(item: tuple[object, object]) -> bool:
    name, value = item
    return isinstance(name, str) and name.isidentifier() and isinstance(value, Tensor)


def refuse_keys(
    method: Frozen, member: str, where: str, keys: object, made: Mapping[str, Tensor], beside: Collection[str] = ()
) -> None:
    """Refuse keys that leave out a trained tensor, name an unknown tensor, or give two tensors one key."""
    cls, names = type(method), made.keys()
    if not isinstance(keys, Mapping) or not all(isinstance(key, str) for key in keys.values()):
        raise _gave(cls, member, where, shown(keys))
    if lost := sorted(name for name, t in made.items() if name not in keys and not method.is_constant(name, t)):
        what = f"{cls.__name__}.{member} leaves out {', '.join(lost)}, which is trained: files would lose it"
        raise PeftfxError(what, where, f"give it a key in {member}(), or name it in frozen() if it is a constant")
    if unknown := sorted(set(keys) - set(names) - set(beside)):
        what = f"{cls.__name__}.{member} names {', '.join(unknown)}, and there is no such tensor"
        raise PeftfxError(what, where, f"there are {', '.join(sorted(names)) or 'none'}")
    if len(set(keys.values())) < len(keys):
        what = f"{cls.__name__}.{member} gives two tensors one key: {', '.join(sorted(keys.values()))}"
        raise PeftfxError(what, where, "each tensor needs a key of its own")


def refuse_forward_output(method: object, where: str, got: object, like: Tensor) -> None:
    """Refuse a result of `forward` that is not of the shape and dtype of `y`."""
    refuse_forward_shape(method, where, got, like.shape)
    if isinstance(got, Tensor) and got.dtype != like.dtype:
        raise _gave(type(method), "forward", where, f"{got.dtype} where y is {like.dtype}")


def refuse_forward_shape(method: object, where: str, got: object, shape: tuple[int, ...]) -> None:
    """Refuse a result of `forward` that is not a tensor of this shape."""
    if not isinstance(got, Tensor):
        raise _gave(type(method), "forward", where, shown(got))
    if got.shape != shape:
        raise _gave(type(method), "forward", where, f"{list(got.shape)} where y is {list(shape)}")


def refuse_fold(method: object, where: str, got: object, like: Tensor, groups: int = 1) -> None:
    """Refuse a result of `fold` that is not a weight and bias of the old shapes. A conv's weight may be dense."""
    if not (isinstance(got, tuple) and len(got) == 2 and isinstance(got[0], Tensor)):
        raise _gave(type(method), "fold", where, shown(got))
    dense = (*like.shape[:1], *(size * groups for size in like.shape[1:2]), *like.shape[2:])
    if tuple(got[0].shape) not in (tuple(like.shape), dense):
        raise _gave(type(method), "fold", where, f"a weight {list(got[0].shape)} where it was {list(like.shape)}")
    if got[1] is not None and (not isinstance(got[1], Tensor) or got[1].shape != like.shape[:1]):
        given = list(got[1].shape) if isinstance(got[1], Tensor) else shown(got[1])
        raise _gave(type(method), "fold", where, f"a bias {given} where {list(like.shape[:1])} fits")


def refuse_folded(method: object, where: str, name: str, got: object, weight: Tensor) -> None:
    """Refuse a result of a pattern method's `fold` that cannot replace the argument `name`."""
    if not isinstance(got, Tensor) or got.shape != weight.shape:
        what = f"{list(got.shape)} for {name}, which is {list(weight.shape)}" if isinstance(got, Tensor) else shown(got)
        raise _gave(type(method), "fold", where, what)


class asking:
    """A context that turns a bare error of a method's own code into a PeftfxError that names the member.

    Every layer of every call is in one, so it is a class: a generator would take three times as long.
    """

    __slots__ = ("member", "method", "where")

    def __init__(self, method: object, member: str, where: str) -> None:
        self.method, self.member, self.where = method, member, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _BARE):
            cls, what = type(self.method), f"{type(error).__name__}: {first_line(error)}"
            told = f"{cls.__name__}.{self.member} failed with {what}"
            raise PeftfxError(told, self.where, _must(cls, self.member)) from error


def _gave(cls: type, member: str, where: str, what: str) -> PeftfxError:
    return PeftfxError(f"{cls.__name__}.{member} gave {what}", where, _must(cls, member))


def _must(cls: type, member: str) -> str:
    return f"{member} must give {_said(cls, member)}"


def _is_default(cls: type, member: str) -> bool:
    """Say whether a class has a member as the contract's own classes define it."""
    found = getattr(cls, member, None)
    return getattr(getattr(found, "fget", found), "__module__", "") in _DEFAULTS


def _said(cls: type, member: str) -> str:
    """Return what the contract says that a member gives: its type, and the first line of its documentation."""
    owners = [c for c in cls.__mro__ if c.__module__.startswith(_CONTRACT) and member in vars(c)]
    if not owners:
        return member
    found = vars(owners[0])[member]
    function: Any = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    kind = inspect.get_annotations(function).get("return", "")
    first = (inspect.getdoc(function) or "").partition("\n")[0]
    return f"{kind}: {first.removeprefix('Return ')}"


def _home(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
