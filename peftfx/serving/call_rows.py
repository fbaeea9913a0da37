"""The adapters' numbers of one call of `generate`, put beside the inputs of each graph that the call runs.

The `generate` of a model's own class knows no such numbers. It may also run the encoder more than once: to find the
language of a recording, or for each piece of a long one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import Cache

from peftfx.errors import PeftfxError
from peftfx.generation.step import Step
from peftfx.views.row_adapters import IDS


class CallRows:
    """The numbers `ids`, one for each row of a call. Beams and samples of a row have its number."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._most = 0

    def beside(self, step: Step) -> Step:
        """Return `step` with the numbers among its inputs."""

        def run(inputs: dict[str, Tensor], cache: Cache | None) -> Mapping[str, Tensor]:
            return step({**inputs, IDS: self._of(len(next(iter(inputs.values()))))}, cache)

        return run

    def _of(self, rows: int) -> Tensor:
        """Return the numbers of `rows` rows.

        Raises:
            PeftfxError: an earlier step had more rows, so nothing tells which rows are left.
        """
        if rows < self._most:
            what = "the rows end at different places, and the graph cannot tell which adapters are left"
            raise PeftfxError(what, IDS, "give long recordings one at a time")
        self._most = rows
        count = len(self.ids)
        return self.ids if not count or rows % count else self.ids.repeat_interleave(rows // count)
