"""Tensors of the base in a HF PEFT file: `save_embedding_layers`, and the base layers of adapted embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from peftfx.adapters.files.names import BASE_LAYER, ORIGINAL, WRAPPERS, override_name, row_layers
from peftfx.bases.guests import own_parameters
from peftfx.contract.override import SAVED, Override
from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError
from peftfx.rules.peft_files import Weights


def replaced_weights(
    base: nn.Module,
    weights: Weights,
    placements: Sequence[Placement],
    overrides: Iterable[Override],
    own_names: Collection[str] = (),
) -> list[Override]:
    """Return the base's tensors that the file has with other values, as overrides that are not trained.

    The file has such a tensor under the base's own name, as the `base_layer` of an adapted module, or as what a saved
    module was before its training. HF PEFT replaces the base's tensor when it loads the file: after a vocabulary was
    resized, the file has the embeddings. Tensors that equal the base's are dropped from `weights.names`. The others
    become overrides that are not trained, of each module by itself if another module has a trained copy of the tensor.
    `own_names` are names that look like the base's but are the method's own: BitFit's biases are its parameters.

    Raises:
        PeftfxError: tied tensors differ in the file.
    """
    overrides = list(overrides)
    tensors = _Tensors(base, placements, overrides)
    named = {key: name for key in weights.names if key not in own_names and (name := tensors.name_of(key))}
    trained = {id(tensors.own[name]): key for key, name in named.items() if tensors.is_trained(key, name)}
    around = tensors.adapted | set(row_layers(overrides))
    found: dict[int, tuple[str, list[Override]]] = {}
    for key, name in named.items():
        tensor = tensors.own[name]
        if tensors.is_of_adapter(key, name):
            continue
        if id(tensor) in tensors.trained_everywhere:  # by another name: a tied bias, with bias="all" under each name
            _refuse_apart(weights, trained.setdefault(id(tensor), key), key)
            copies = [o for o in overrides if tensors.own.get(o.name) is tensor]
            weights.repeat(key, [override_name(copy, around) for copy in copies])  # with "lora_only", under this alone
            weights.names.pop(key)
        elif not _differs(weights, key, tensor):
            weights.names.pop(key)
        elif id(tensor) in found:
            _refuse_apart(weights, found[id(tensor)][0], key)
            if id(tensor) not in tensors.trained:
                weights.names.pop(key)
        elif id(tensor) in tensors.trained:  # another module has a copy of its own
            within = [_within(each) for each in tensors.untrained_names(tensor)]
            found[id(tensor)] = key, within
            weights.repeat(key, [override_name(override, around) for override in within])
        else:
            found[id(tensor)] = key, [Override(f"{SAVED}.{name}", "", name, trained=False)]
    return [override for _, made in found.values() for override in made]


def take_one_name(weights: Weights, overrides: Iterable[Override]) -> None:
    """Leave one of a file's names of each copied tensor that has several names within its module.

    If the file has several values of it, the last one counts, as where torch loads the file into the module.
    """
    for override in overrides:
        first, *others = (own.key.removeprefix(f"{SAVED}.") for own in override.by_each_name())
        there = [name for name in (first, *others) if name in weights.names]
        if not others or not there:
            continue
        weights.names[first], weights.shapes[first] = weights.names[there[-1]], weights.shapes[there[-1]]
        for name in others:
            weights.names.pop(name, None)
            for again in _around(weights, override.module, name.removeprefix(f"{override.module}.")):
                if ORIGINAL in again or torch.equal(weights[again], weights[first]):
                    weights.names.pop(again)


def _around(weights: Weights, module: str, name: str) -> list[str]:
    """Return a file's further names of a copied module's tensor. With `bias="all"`, HF PEFT repeats it under them."""
    begins = (f"{module}{ORIGINAL}", f"{module}.modules_to_save.")
    return [key for key in weights.names if key.startswith(begins) and key.endswith(f".{name}")]


class _Tensors:
    """The base's tensors by their names, of which a tied tensor has several, and what an adapter's copies replace.

    Attributes:
        own: the tensors.
        adapted: paths of modules that HF PEFT has a layer around: by a path or by a tied weight.
        trained: the ids of tensors of which the adapter has a copy, for one module or for all.
        trained_everywhere: the ids of those whose copy all modules read.
    """

    def __init__(self, base: nn.Module, placements: Sequence[Placement], overrides: Sequence[Override]) -> None:
        self.own: dict[str, Tensor] = dict(own_parameters(base, remove_duplicate=False))
        self.own |= dict(base.named_buffers(remove_duplicate=False))
        layers = {p.site.path for p in placements}
        adapted = {id(self.own[name]) for path in layers if (name := f"{path}.weight") in self.own}
        self.adapted = layers | {n.removesuffix(".weight") for n, tensor in self.own.items() if id(tensor) in adapted}
        self._names = {o.key.removeprefix(f"{SAVED}.") for override in overrides for o in override.by_each_name()}
        self.trained = {id(self.own[name]) for name in self._names if name in self.own}
        whole = [o.name for o in overrides if not o.module and not o.rows]
        self.trained_everywhere = {id(self.own[name]) for name in whole if name in self.own}
        self._untrained: dict[int, list[str]] = {}
        for name, tensor in self.own.items():
            if name not in self._names:
                self._untrained.setdefault(id(tensor), []).append(name)

    def name_of(self, key: str) -> str | None:
        """Return the name of the base's tensor that a key of a file stands for, or None."""
        if key in self.own:
            return key
        for mark in WRAPPERS:
            path, found, leaf = key.partition(mark)
            name = f"{path}.{leaf}"
            if found and name in self.own and (mark != BASE_LAYER or path in self.adapted):
                return name
        return None

    def untrained_names(self, tensor: Tensor) -> list[str]:
        """Return the names by which modules read a tensor itself, and no copy of it."""
        return self._untrained.get(id(tensor), [])

    def is_trained(self, key: str, name: str) -> bool:
        """Return whether a key holds the adapter's copy of the tensor with this name."""
        return name in self._names and ORIGINAL not in key

    def is_of_adapter(self, key: str, name: str) -> bool:
        """Return whether a key holds the adapter's copy, or the tensor before its training, if no module reads that."""
        before, trained = ORIGINAL in key, name in self._names
        if before and trained:
            tensor = self.own[name]
            return id(tensor) in self.trained_everywhere or not self.untrained_names(tensor)
        return before or trained


def _within(name: str) -> Override:
    """Return an untrained override of one of a tensor's names, for the module that has it under this name."""
    module, _, leaf = name.rpartition(".")
    return Override(f"{SAVED}.{name}", module, leaf, trained=False)


def _refuse_apart(weights: Weights, before: str, key: str) -> None:
    """Refuse two tensors of a file that differ, and that are one tensor in the model."""
    if not torch.equal(weights[before], weights[key]):
        hint = "untie the base's embeddings (tie_word_embeddings=False), and load it on that"
        raise PeftfxError(f"this and {before} are one tensor in the model, but they differ in the file", key, hint)


def _differs(weights: Weights, key: str, tensor: Tensor) -> bool:
    """Return whether the file's tensor is not equal to the base's tensor; another shape is a difference too."""
    if weights.shapes[key] != tuple(tensor.shape):
        return True
    return tensor.is_meta or not torch.equal(weights[key].to(tensor), tensor)
