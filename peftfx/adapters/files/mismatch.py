"""The comparison of the names in an adapter's file with those that a base needs; one error lists each misfit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from peftfx.errors import PeftfxError, how_many, nearest
from peftfx.graph.places import above
from peftfx.rules.peft_files import Weights


def refuse_mismatch(
    weights: Weights,
    wanted: Mapping[str, Tensor],
    harmless: Collection[str],
    where: Path,
    *,
    modules: Sequence[str],
    expected: Collection[str] = (),
    module_of: Callable[[str], str] = lambda name: name,
    why: Callable[[str], str] = lambda path: "",
    other_tokens: Callable[[], str] = lambda: "",
) -> None:
    """Refuse a file that does not fit the base, in one error that lists everything that does not fit.

    Args:
        weights: the file.
        wanted: the tensors that this base needs from the file, by name.
        harmless: the names of tensors that change nothing.
        where: the file's directory, for the message.
        modules: the base's module paths, from which the message suggests the nearest.
        expected: module paths for which the file must have at least one tensor.
        module_of: returns the module path in a name.
        why: returns why the module at a path cannot be adapted, or an empty text if no reason is known.
        other_tokens: returns what to do if the file's embeddings have another number of tokens, else an empty text.
    """
    left = weights.names.keys() - wanted.keys() - set(harmless)
    odd = {name: told for name in sorted(left) if (told := _told_of_state(name, module_of(name), modules))}
    reasons = {path: why(path) for path in {module_of(name) for name in left - odd.keys()} - left}
    homeless: dict[str, int] = {}
    for name in (name for name in left if reasons.get(module_of(name))):
        homeless[module_of(name)] = homeless.get(module_of(name), 0) + 1
    held = {path for name in weights.names for path in above(name)}
    absent = [f"every key of {path}" for path in sorted(expected) if path not in held]
    unexpected = sorted(name for name in left if module_of(name) not in homeless)
    misshapen = [
        f"{n}: {list(weights.shapes[n])} in the file, {list(t.shape)} in this model"
        for n, t in wanted.items()
        if n in weights.names and weights.shapes[n] != tuple(t.shape)
    ]
    lists = {
        "missing": sorted(wanted.keys() - weights.names.keys()) + absent,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "of modules that cannot be adapted here": [
            f"{path} ({how_many(count, 'tensor')}): {reasons[path]}" for path, count in sorted(homeless.items())
        ],
    }
    if not any(lists.values()):
        return
    lines = [f"{_count(what, items, homeless)} {what}: {_listed(items)}" for what, items in lists.items() if items]
    some_fit = len(unexpected) < len(weights.names)  # a file of which nothing fits is of another model
    hint = (
        next(iter(odd.values()), "")
        or _told_of_modules(modules, homeless=bool(homeless) and not unexpected)
        or (nearest(module_of(unexpected[0]), modules) if unexpected and some_fit else "")
        or ("" if unexpected else other_tokens())
        or "load it on the model that it was trained on (the same size, the same number of labels and of tokens)"
    )
    raise PeftfxError("this adapter does not fit the model:\n  " + "\n  ".join(lines), str(where), hint)


def _told_of_modules(modules: Collection[str], *, homeless: bool) -> str:
    """Return what to do about the model's modules; empty for others.

    Args:
        modules: the paths of the modules.
        homeless: whether all that does not fit is of modules that cannot be adapted.
    """
    if any(path.endswith(".base_layer") for path in modules):
        return "this model has layers of peft in it: load the file onto the model without them"
    if homeless:
        return "merge the adapter into the base with HF PEFT; or, in Python, pass inputs= of a call that runs them"
    return ""


def _told_of_state(name: str, path: str, modules: Collection[str]) -> str:
    """Return what to do about a name that a model's whole state has, and HF PEFT's files have not; empty for others."""
    inside = name.startswith("module.") and "module" not in modules
    wrapper = next((word for word in name.split(".") if word in _WRAPPERS), "module" * inside)
    if wrapper:
        what = f"{wrapper!r} in the keys is of a wrapper of torch"
        return f"{what}: save the model inside it by save_pretrained, or take the word out of the keys"
    inner = name.removeprefix(f"{path}.").split(".")
    if len(inner) == 3 and inner[2] in ("weight", "bias") and inner[1] not in _OF_PEFT and path in modules:
        what = f"{inner[1]!r} in the keys is an adapter's name, as state_dict() has it"
        return f"{what}: save the adapter by save_pretrained, or take the name out of the keys"
    return ""


_OF_PEFT = ("base_layer", "original_module")
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def _count(what: str, items: Sequence[str], homeless: Mapping[str, int]) -> int:
    return sum(homeless.values()) if "modules" in what else len(items)


def _listed(items: list[str], most: int = 12) -> str:
    more = f"\n    ... and {len(items) - most} more" if len(items) > most else ""
    return "".join(f"\n    {item}" for item in items[:most]) + more
