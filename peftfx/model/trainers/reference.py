"""The reference model of a trainer: an adapted model with other adapters, or with none, over the same tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.errors import warn
from peftfx.model.by_name import AdaptersByName
from peftfx.model.trainers.hashed import hash_of


class ReferenceModel(nn.Module):
    """A model whose calls are an adapted model's calls with these adapters, without gradients.

    The reference model has no parameters of its own, and the adapted model is not its child module. So a change of
    mode or device, or an optimizer of the reference model, does not reach the adapted model.
    """

    def __init__(self, model: AdaptersByName, names: Sequence[str] = ()) -> None:
        super().__init__()
        self._held, self._names = (model,), tuple(names)
        with model.named.acting_as(self._names):
            pass

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the outputs of the adapted model."""
        model = self._held[0]
        return type(model).forward(model, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the adapted model with the reference's adapters, also where other code replaced `forward`."""
        model = self._held[0]
        model.settle_dropout(self._names)
        with torch.no_grad(), model.named.acting_as(self._names):
            if "forward" not in vars(self):
                return super().__call__(*args, **kwargs)
            return model.run_other(super().__call__, args, kwargs)

    def get_extra_state(self) -> Tensor:
        """Return a hash of what the reference computes: all that `state_dict` has.

        TRL's `precompute_ref_log_probs` keeps results in files, under a hash of the state: without tensors, the states
        of all references would be equal.
        """
        with self._held[0].named.acting_as(self._names):
            return hash_of(self._held[0])

    def set_extra_state(self, state: Tensor) -> None:
        """Warn if a state is that of another reference: no tensor is loaded.

        Args:
            state: what `get_extra_state` returned.
        """
        if not torch.equal(state.cpu(), self.get_extra_state()):
            warn("the loaded state is that of a reference with another base, or with other adapters: nothing is loaded")

    def __getattr__(self, name: str) -> object:  # type: ignore[override]
        """Return an attribute of the adapted model (`config`, `device`, ...); methods run with its own adapters."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["_held"][0], name)
        if isinstance(value, nn.Module) or not callable(value):
            return value

        @functools.wraps(value)
        def run(*args: Any, **kwargs: Any) -> object:
            with torch.no_grad(), self._held[0].named.acting_as(self._names):
                return value(*args, **kwargs)

        return run
