"""LastRun: a function that runs views of a model, and does not repeat the run before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfx.views.view import RunView, View


@dataclass
class LastRun:
    """A function that runs the model in a view. If a call equals the call before, its outputs are returned again.

    Attributes:
        run: the function that runs the model.
    """

    run: RunView
    _last: tuple[View, Mapping[str, Tensor], Mapping[str, Tensor]] | None = None

    def __call__(self, view: View, feed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the outputs of the view for these inputs."""
        if self._last is None or self._last[0] != view or not _same(self._last[1], feed):
            self._last = view, feed, self.run(view, feed)
        return self._last[2]


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
