"""What served models of images and of sounds share: they generate by the `generate` of the model's own class."""

from __future__ import annotations

from typing import Any

from peftfx.serving.served import under_one_adapter
from peftfx.views.row_adapters import IDS


class ByOwnClass:
    """A mixin, before those of steps, for a served model with a stand-in of its own class, `_own`."""

    _own: Any
    as_tensors: Any

    @under_one_adapter
    def generate(self, *args: Any, **options: Any) -> Any:
        """Generate by the `generate` of the model's own class. Rows have the adapters of `adapter_ids`."""
        options.pop(IDS, None)  # kept while this method runs
        args, options = self.as_tensors(args, options)
        return self._own.generate(*args, **options)
