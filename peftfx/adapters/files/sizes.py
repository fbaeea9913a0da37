"""The comparison of a config's sizes with the header of its file, before memory is allocated."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from peftfx.adapters.files.names import name_of
from peftfx.adapters.files.torch_attention import path_in_file
from peftfx.contract.method import Params
from peftfx.contract.placed import Placed, shared_by
from peftfx.contract.placement import Placement
from peftfx.errors import PeftfxError
from peftfx.rules.peft_files import Weights


def without_memory(needed: bool = True) -> contextlib.AbstractContextManager[object]:
    """Return a context in which new tensors have shapes and dtypes but no values, if `needed`."""
    return FakeTensorMode(allow_non_fake_inputs=True) if needed else contextlib.nullcontext()


def fit(rule: Placed, weights: Weights, base: nn.Module) -> bool:
    """Return whether the tensors that a rule makes have the shapes of the file's tensors of the same names."""
    try:
        with without_memory(), torch.no_grad():
            shared = shared_by(rule, base, None)
            return all(_fits(rule, placement, shared, weights, base) for placement in rule.placements)
    except DataDependentOutputException:  # initial values that depend on the base's values
        return True


def _fits(rule: Placed, placement: Placement, shared: Params, weights: Weights, base: nn.Module) -> bool:
    try:
        made = placement.init(base, None, {n: shared[kept] for n, kept in rule.reads(placement, shared).items()})
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        hint = "look at the ranks in adapter_config.json"
        raise PeftfxError(
            "its config asks for a tensor that is larger than any memory", placement.site.path, hint
        ) from error
    path = path_in_file(base, placement.method, placement.site.path)
    names = {name: name_of(path, suffix) for name, suffix in placement.suffixes().items()}
    return all(weights.shapes.get(names[n], t.shape) == tuple(t.shape) for n, t in made.items() if n in names)
