"""The use of each tensor of an adapter's file: every tensor is accounted for, or the file is refused.

A tensor is *taken* into the adapter; or it is a *repeat* of a tensor of the base or of the file; or it is *unused*: the
tensor of a module that the config leaves out, or that provably never runs, or whose results reach no output of this
call, or that this call does not run (but may read the weight of) and the tensor does not change. Such a tensor changes
nothing in HF PEFT either. Unused tensors are kept, and saved again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.adapters.files.names import ORIGINAL, module_of
from peftfx.contract.method import Method
from peftfx.contract.override import TOKENS
from peftfx.contract.placement import whole_tensors
from peftfx.errors import listed, warn
from peftfx.graph.places import has_module
from peftfx.rules.peft_files import Weights
from peftfx.rules.placements import placement_at
from peftfx.rules.unplaced import never_runs, site_without_calls
from peftfx.sites.sites import Sites

#: What HF PEFT puts into the names of a trained module's tensors; of the module's parts, the adapter's name too.
_SAVED = (re.compile(r"\.(?:modules_to_save|original_module)(?=\.)"), re.compile(r"\.modules_to_save\.[^.]+(?=\.)"))


def repeats(weights: Weights, taken: Collection[str], base: nn.Module, method: Method) -> set[str]:
    """Return the names of tensors that are not taken and only repeat a tensor of the base or of the file.

    HF PEFT repeats these tensors:

    - the frozen weight of an adapted embedding;
    - with `bias="all"`, each bias in a saved module, three times;
    - the rows of trained tokens, once for each module that has the tensor;
    - RandLoRA's bases, once for each module, although all modules share them;
    - what a saved module was before its training (`original_module`). It may have other values than the base, as the
      trained copy acts in its place;
    - in a copy of a norm, what the modules in the norm have;
    - DoRA's magnitudes of an embedding that is in the file, too, under the name that they have in memory.
    """
    return {
        name
        for name in weights.names.keys() - set(taken)
        if (name.replace(ORIGINAL, ".") in taken and ORIGINAL in name)
        or any(_equal(weights[name], t) for t in _originals(weights, name, taken, base))
        or any(_equal(weights[name], t) for t in _in_copies(method, name, taken, base))
    }


def _in_copies(method: Method, name: str, taken: Collection[str], base: nn.Module) -> Iterator[Tensor]:
    """Yield the base's tensors that this name of a copied module, of which other tensors are taken, may stand for.

    HF PEFT leaves its adapter's name in the names of what a module in the copied one has.
    """
    if method.copy_mark():
        path, mark, leaf = name.partition(f".{method.copy_mark()}")
        if mark and any(other.startswith(f"{path}{mark}") for other in taken):
            yield from (t for end in (leaf, leaf.partition(".")[2]) for t in _tensor(base, f"{path}.{end}"))


def _originals(weights: Weights, name: str, taken: Collection[str], base: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that the tensor `name` may be a copy of."""
    if name.endswith(f".{TOKENS}"):
        same = (n for n in taken if n.endswith(f".{TOKENS}") and _is_tied(base, _owner(n), _owner(name)))
        yield from (weights[n] for n in same)
    leaf = name.rpartition(".")[2]
    yield from (weights[n] for n in taken if n == f"base_model.{leaf}" and n in weights.names)
    yield from (weights[n] for n in taken if name == f"{n}.weight" and n in weights.names)
    if name.endswith((".base_layer.weight", ".base_layer.bias")):
        yield from _tensor(base, name.replace(".base_layer.", "."))
    for plain in {wrapped.sub("", name, count=1) for wrapped in _SAVED} - {name}:
        yield from [weights[plain]] if plain in weights.names else []
        yield from _tensor(base, plain)


def _owner(name: str) -> str:
    return name.removesuffix(f".{TOKENS}").removesuffix(".token_adapter")  # which it has beside another method


def _is_tied(base: nn.Module, one: str, other: str) -> bool:
    weights = [getattr(base.get_submodule(path), "weight", None) for path in (one, other) if has_module(base, path)]
    return len(weights) == 2 and weights[0] is not None and weights[0] is weights[1]


def _tensor(base: nn.Module, name: str) -> Iterator[Tensor]:
    path, _, leaf = name.rpartition(".")
    try:
        value = getattr(base.get_submodule(path), leaf)
    except AttributeError:
        return
    if isinstance(value, Tensor):
        yield value.detach()


def _equal(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and torch.equal(value.to(other.device, other.dtype), other)


def _copies(method: Method, tensors: Mapping[str, Tensor], base: nn.Module, path: str) -> bool:
    """Return whether a file's tensors of a module, by their suffixes, are copies of this module's own."""
    own = {f"{method.copy_mark()}{name}": value for name, value in base.get_submodule(path).state_dict().items()}
    return bool(method.copy_mark()) and all(
        suffix in own and _equal(value, own[suffix]) for suffix, value in tensors.items()
    )


def _changes_nothing(method: Method, tensors: Mapping[str, Tensor], base: nn.Module, path: str) -> bool:
    """Return whether a file's tensors of a module, by their suffixes, leave this module as it is."""
    known = method.changes_nothing(tensors) or _copies(method, tensors, base, path)
    return known or _keeps_weight(method, tensors, base, path)


@torch.no_grad()
def _keeps_weight(method: Method, tensors: Mapping[str, Tensor], base: nn.Module, path: str) -> bool:
    """Return whether the method folds these tensors into what the module has, but for rounding: DoRA's, or PiSSA's."""
    site = site_without_calls(path, base)
    if site is None or not method.acts_at(site) or method.has_shared or method.inputs:
        return False
    placement = placement_at(method, base, site).on_weight
    if placement is None:
        return False
    suffixes = placement.suffixes()
    if placement.file_suffixes() != suffixes or set(suffixes.values()) != tensors.keys():
        return False
    with torch.random.fork_rng(devices=[]):  # what is drawn is replaced by the file's
        made = placement.init(base, None)
    p = made | {name: tensors[end].to(made[name].device) for name, end in suffixes.items()}
    if any(value.shape != made[name].shape for name, value in p.items()):
        return False
    wide = {name: value.float() if value.is_floating_point() else value for name, value in p.items()}
    weight, bias = whole_tensors(base, placement.site)
    own = placement.base(weight.float(), None if bias is None else bias.float())
    folded = placement.method.fold(placement.view, own, wide)
    pairs = [(folded.weight, own.weight), *([] if folded.bias is own.bias else [(folded.bias, own.bias)])]
    # In half precision HF PEFT rounds DoRA's magnitudes to it.
    rtol = torch.finfo(weight.dtype).eps / 2
    return all(
        a is not None and b is not None and torch.allclose(a, b, rtol=rtol, atol=1e-6 * float(b.abs().max()))
        for a, b in pairs
    )


@dataclass(frozen=True)
class Idle:
    """The tensors of an adapter's file that change nothing in the call with which the file is loaded.

    Attributes:
        by_module: the tensors' names, each with the path of its module.
        never: the paths of modules that provably no call runs.
        unread: the paths of modules that this call runs, but whose results reach no output.
        untrained: the paths of other modules that this call does not run, and that their tensors do not change. A
            training that never runs a module leaves its tensors as they were made: HF PEFT's "all-linear" picks the
            layers of an image encoder, too, and texts train nothing there.
        read: the paths of modules whose weights the model's code reads past their calls, and that their tensors do not
            change: a training in HF PEFT runs nothing of its layers there.
        left_out: the paths of modules that the adapter's config leaves out.
    """

    by_module: Mapping[str, str]
    never: frozenset[str]
    unread: frozenset[str]
    untrained: frozenset[str]
    read: frozenset[str]
    left_out: frozenset[str] = frozenset()

    @classmethod
    def among(
        cls,
        names: Collection[str],
        weights: Weights,
        method: Method,
        marks: Collection[str],
        base: nn.Module,
        sites: Sites,
        left_out: Collection[str] = (),
    ) -> Idle:
        """Return the idle tensors among those of these names.

        Args:
            names: the names of tensors that nothing was made of.
            weights: the file.
            method: the method of the file's rule.
            marks: what begins the suffixes of the method's tensors.
            base: the model.
            sites: the sites of the call.
            left_out: the paths of modules that the config leaves out.
        """
        suffixes: dict[str, dict[str, str]] = {}
        for name in names:
            path = module_of(name, marks)
            if path not in names:
                suffixes.setdefault(path, {})[name.removeprefix(f"{path}.")] = name
        outside = frozenset(suffixes.keys() & left_out)
        unread = frozenset(suffixes.keys() & sites.unread) - outside
        never = frozenset(path for path in suffixes.keys() - unread - outside if never_runs(path, base, sites))
        others = (
            path
            for path in suffixes.keys() - unread - never - outside
            if path not in sites.called and has_module(base, path)
        )
        own = ((path, {end: weights[name] for end, name in suffixes[path].items()}) for path in others)
        zero = frozenset(path for path, tensors in own if _changes_nothing(method, tensors, base, path))
        idle = unread | never | zero | outside
        by_module = {name: path for path in sorted(idle) for name in suffixes[path].values()}
        read = zero & {*sites.reads, *(site.path for site in sites)}
        return cls(by_module, never, unread, zero - read, read, outside)

    @property
    def of_this_call(self) -> frozenset[str]:
        """The paths of modules whose tensors may change something in another call, or in training."""
        return self.unread | self.untrained

    @property
    def outside(self) -> frozenset[str]:
        """The names of the tensors that the adapter's config leaves out: they ask for nothing."""
        return frozenset(name for name, path in self.by_module.items() if path in self.left_out)

    def tell(self, where: Path) -> None:
        """Warn of the idle tensors in the directory `where`, for each reason by itself."""
        for paths, why in (
            (self.never, "no call of the model runs"),
            (self.unread, "this call uses nothing of"),
            (self.untrained, "this call does not run"),
            (self.read, "the model's code reads weights, and makes no call, of"),
            (self.left_out, "the adapter's config leaves out"),
        ):
            names = sorted(name for name, path in self.by_module.items() if path in paths)
            if names:
                warn(
                    f"{where}: {why} the modules of {listed(names, 3)}; these tensors "
                    "change nothing, here and in HF PEFT. They are kept, and saved again"
                )
