"""OverrideMethod: what a rule does where it trains copies of a module's own tensors, in their place.

Nothing is computed beside the base: within the module, the graph reads the copies. That is exact whatever the module
does with its tensors. Merged, a copy is the tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from peftfx.contract.method import Method
from peftfx.sites.site import NORM, WEIGHT_KINDS, Site


class OverrideMethod(Method):
    """A method that trains copies of what the modules that it targets hold."""

    kinds: ClassVar[frozenset[str]] = frozenset({*WEIGHT_KINDS, NORM})

    @abstractmethod
    def copied(self, site: Site, names: Sequence[str]) -> Sequence[str]:
        """The tensors that it copies, of all that the site's module holds, by their names there.

        Parameters are trained; buffers, as a batch norm's averages, go with them.
        """

    def rows(self) -> tuple[int, ...]:
        """The rows of each tensor that are trained, where not all are."""
        return ()

    @abstractmethod
    def suffix(self, name: str) -> str:
        """A copy's suffix in a HF PEFT checkpoint."""
