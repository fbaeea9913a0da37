"""What served models of images and of sounds share: they generate by the `generate` of the model's own class."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from peftfx.generation.of_thread import OfThread
from peftfx.serving.served import under_one_adapter
from peftfx.views.row_adapters import IDS


class ByOwnClass:
    """A mixin, before those of steps, for a served model with a stand-in of its own class, `_stand_in`."""

    _stand_in: Any
    as_tensors: Any
    _copy = OfThread()

    @property
    def _own(self) -> Any:
        """The stand-in of this thread. The class's code keeps in it what it counts of a text (`rope_deltas`)."""
        if self._copy is None:
            self._copy = _copied(self._stand_in)
        return self._copy

    @under_one_adapter
    def generate(self, *args: Any, **options: Any) -> Any:
        """Generate by the `generate` of the model's own class. Rows have the adapters of `adapter_ids`."""
        options.pop(IDS, None)  # kept while this method runs
        args, options = self.as_tensors(args, options)
        return self._own.generate(*args, **options)


def _copied(model: Any) -> Any:
    """Return a copy of a model, and of the part without a head, which shares all else with it."""
    made, prefix = copy.copy(model), model.base_model_prefix
    part = model._modules.get(prefix)
    if isinstance(part, nn.Module):
        vars(made)["_modules"] = {**model._modules, prefix: copy.copy(part)}
    return made
