"""The base's tensors that a rule trains copies of: whole modules, biases, and rows of tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import nn

from peftfx.bases.guests import own_modules, own_parameters
from peftfx.contract.method import Method
from peftfx.contract.override import SAVED, Override
from peftfx.errors import PeftfxError, nearest
from peftfx.graph.places import places_of
from peftfx.rules.tied_copies import TYING, tied_in_rule
from peftfx.rules.token_rows import trained_tokens
from peftfx.sites.site import Site


def saved_modules(base: nn.Module, method: Method) -> tuple[str, ...]:
    """Return the module paths that `modules_to_save` names: paths that end with a given name, as in HF PEFT.

    So `classifier` also names DistilBERT's `pre_classifier`. Modules that are tied with a named one are there, too, if
    the rule has one copy for all of them.
    """
    names = tuple(method.modules_to_save or ())
    found = tuple(path for path, _ in own_modules(base) if path and path.endswith(names)) if names else ()
    found += tuple(path for path in tied_in_rule(base, method) if path not in found)
    return tuple(p for p in found if not any(p.startswith(f"{q}.") for q in found))


def no_module_to_save(base: nn.Module, method: Method, saved: Sequence[str]) -> PeftfxError | None:
    """Return an error if `modules_to_save` names no module of this base, else None."""
    names = tuple(method.modules_to_save or ())
    if not names or saved:
        return None
    ends = sorted({path.rpartition(".")[2] for path, _ in own_modules(base) if path})
    return PeftfxError(f"no module is named {' or '.join(names)}", "modules_to_save", nearest(names[0], ends))


def overrides_of(base: nn.Module, method: Method, saved: Collection[str], sites: Iterable[Site]) -> list[Override]:
    """Return the base's tensors that a rule trains copies of: whole modules, biases, and rows of tokens."""
    found = []
    places = places_of(base) if saved else {}
    tied = tied_in_rule(base, method)
    for path in tied[:1]:
        _refuse_others_than_heads(base, tied)
        found.append(Override(f"{SAVED}.{path}.weight", "", f"{path}.weight", tied=True))
    for path in (path for path in saved if path not in tied):
        if path in places and any(base.get_submodule(path).children()):
            what = f"the base holds this module under other names too: {', '.join(places[path][1:4])}"
            raise PeftfxError(what, path, "name the layers in it, or leave it out of modules_to_save")
        tensors: dict[int, list[str]] = {}
        for name, tensor in base.get_submodule(path).state_dict(keep_vars=True).items():
            tensors.setdefault(id(tensor), []).append(name)
        found += [Override(f"{SAVED}.{path}.{n}", path, n, others=tuple(more)) for n, *more in tensors.values()]
    if method.bias == "all":
        # A tensor that a saved module has too is trained there alone, as in HF PEFT.
        apart = {id(p) for n, p in own_parameters(base, remove_duplicate=False) if is_inside(n, saved)}
        names = [n for n, p in own_parameters(base) if n.rpartition(".")[2] == "bias" and id(p) not in apart]
        found += [Override(f"{SAVED}.{name}", "", name) for name in names]
    elif method.bias.endswith("_only"):
        # As for "all", a tensor has the first of its names: that of a layer in HF PEFT's file.
        own, first = dict(own_parameters(base, remove_duplicate=False)), {id(p): n for n, p in own_parameters(base)}
        read = [site.bias.partition(".")[2] for site in sites if site.bias is not None]
        names = [first[id(own[name])] if name in own else name for name in read]
        found += [Override(f"{SAVED}.{name}", "", name) for name in names]
    return found + trained_tokens(base, method.trainable_token_indices, saved)


def _refuse_others_than_heads(base: nn.Module, tied: Sequence[str]) -> None:
    """Refuse one copy for modules of which HF PEFT could not run one: it puts a linear layer without a bias there."""
    for path in tied[1:]:
        module = base.get_submodule(path)
        more = [name for name in module.state_dict() if name != "weight"]
        if more or isinstance(module, nn.Embedding):
            why = f"has a {more[0]} beside the tied weight" if more else "is an embedding"
            what = f"HF PEFT's one copy is a linear layer without a bias at this module, which {why}"
            raise PeftfxError(what, path, f"leave {TYING} out: the named module then has its own copy")


def is_inside(path: str, modules: Iterable[str]) -> bool:
    """Return whether a path is one of these modules, or inside one of them."""
    return any(path == m or path.startswith(f"{m}.") for m in modules)
