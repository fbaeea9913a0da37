"""The adapters that rows of a batch choose from: their names, and the numbers that the graphs of a call take.

The `generate` of a model's own class knows no such numbers. It may also run the encoder more than once: to find the
language of a recording, or for each piece of a long one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from peftfx.errors import PeftfxError, nearest, shown
from peftfx.files import is_file
from peftfx.formats import BATCHED, read_stamped
from peftfx.generation.step import Step
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.row_adapters import IDS, NAMES, NO_ADAPTER


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


class KeptRows(threading.local):
    """The adapters' numbers in this thread, for calls that do not give them; None keeps none."""

    ids: Tensor | None = None


class RowAdapters:
    """What a served model knows of the adapters that its rows choose from.

    Attributes:
        directory: the exported directory.
        model: the ONNX model.
        active: the name of the active adapter, or None.
    """

    directory: Path
    model: OnnxModel
    active: str | None
    _rows: KeptRows

    def adapter_ids(self, names: Sequence[str | None]) -> Tensor:
        """Return the input `adapter_ids` that gives each row of a batch the adapter of its name in `names`, or none.

        Raises:
            PeftfxError: the model has no such adapter, or was not exported with adapters to choose from.
        """
        known = self.row_adapters
        if not known and any(name is not None for name in names):
            raise self._no_choice()
        unknown = next((name for name in names if name is not None and name not in known), None)
        if unknown is not None:
            hint = nearest(str(unknown), known) or f"adapters here: {', '.join(known)}"
            raise PeftfxError(f"the model has no adapter {unknown!r}", str(self.directory), hint)
        return torch.tensor([-1 if name is None else known.index(name) for name in names], dtype=torch.long)

    @cached_property
    def row_adapters(self) -> list[str]:
        """The names of the adapters that rows choose from, in the order of their numbers."""
        path = self.directory / BATCHED
        known = read_stamped(path, "export it again").get("adapters") if is_file(path) else []
        if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
            raise PeftfxError("the file has no list of the adapters", str(path), "export the model again")
        return known

    def with_ids(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the `inputs`, with adapter numbers if the model needs them: the active adapter's, or -1 for none.

        Raises:
            PeftfxError: the inputs have adapter numbers, and the model has no adapters to choose from; or a number is
                not an adapter's; or there is not one number for each row.
        """
        given, first = self.numbered(inputs), next(iter(inputs.values()))
        if IDS not in self.model.inputs:
            if IDS in given:
                raise self._no_choice()
            return given
        ids = given[IDS] if IDS in given else self.numbers_of(first.shape[0])
        self._check_ids(ids, first.shape[0])
        return {**given, IDS: ids.long()}

    def numbered(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `inputs`, with adapters' numbers in place of their names in `adapter_ids`, or in `adapter_names`.

        In `adapter_names`, HF PEFT's argument, `__base__` is no adapter.

        Raises:
            PeftfxError: there is no such adapter, or one name is given for all rows, or both arguments are given.
        """
        names, ids = inputs.get(NAMES), inputs.get(IDS)
        inputs = {name: value for name, value in inputs.items() if name != NAMES}
        if names is not None and ids is not None:
            raise PeftfxError(f"both {NAMES} and {IDS} say which adapters rows have", NAMES, "give one of them")
        if names is not None:
            if not isinstance(names, list | tuple):
                raise PeftfxError(f"not a list of names: {shown(names)}", NAMES, "give one adapter's name for each row")
            if not self.row_adapters:
                raise self._no_choice()
            return {**inputs, IDS: self.adapter_ids([None if name == NO_ADAPTER else name for name in names])}
        if isinstance(ids, str):
            hint = f"pass [{ids!r}, ...]: a name, or None, for each row; or set_adapter({ids!r}) for all rows"
            raise PeftfxError(f"one name is no list of names: {shown(ids)}", IDS, hint)
        named = isinstance(ids, list | tuple) and not (ids and all(type(number) is int for number in ids))
        if ids is None or isinstance(ids, Tensor):
            return dict(inputs)
        return {**inputs, IDS: self.adapter_ids(ids) if named else torch.as_tensor(ids)}

    def _no_choice(self) -> PeftfxError:
        hint = "export it with --batched NAME=DIR"
        return PeftfxError("the rows of this model have no adapters to choose from", str(self.directory), hint)

    @contextmanager
    def _numbering(self, ids: Tensor | None) -> Iterator[None]:
        """Keep the adapters' numbers, in this thread, for the calls of a `with` block that do not give them.

        transformers leaves them out of calls of its own: those that guide a text by one without its prompt.
        """
        before, self._rows.ids = self._rows.ids, self.numbers_of(1) if ids is None else ids
        try:
            yield
        finally:
            self._rows.ids = before

    def numbers_of(self, rows: int) -> Tensor:
        """Return the adapters' numbers of as many rows: those that are kept, or the active adapter's."""
        ids = self._rows.ids
        if ids is None:
            known = self.row_adapters
            return torch.full((rows,), known.index(self.active) if self.active in known else -1)
        return ids.repeat_interleave(rows // len(ids)) if len(ids) and rows % len(ids) == 0 else ids

    def _check_ids(self, ids: Tensor, rows: int) -> None:
        hint = "pass adapter_ids([name, None, ...]) of this model: a name, or None, for each row"
        if ids.dtype not in _INTEGERS or ids.ndim != 1:
            dtype = str(ids.dtype).removeprefix("torch.")
            raise PeftfxError(f"{rows} rows need {rows} whole numbers, not {dtype} {list(ids.shape)}", IDS, hint)
        if len(ids) != rows:
            told = "give each row one: its name in the first, or its number in the second"
            raise PeftfxError(f"{rows} rows need {rows} adapters, not {len(ids)}", f"{NAMES} or {IDS}", told)
        wrong = sorted({number for number in ids.tolist() if not -1 <= number < len(self.row_adapters)})
        if wrong:
            most = len(self.row_adapters) - 1
            what = f"no adapter has the number {wrong[0]}: the numbers are 0 to {most}, or -1 for no adapter"
            raise PeftfxError(what, IDS, hint)


_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
