"""The options of the export of an adapter, for a graph that has slots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from peftfx.export_options.checked import Checked
from peftfx.field_types import refuse_misfit_fields
from peftfx.options import CAT, check_choices, check_tolerance


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Checked):
    """The options of the export of a model's active adapters.

    Args:
        check: run the graph with the adapter in ONNX Runtime, and compare it with torch.
        force: replace the file if it exists.
        atol, rtol: the tolerance of an output, `atol + rtol * largest magnitude`; by default that of the graph's
            export, or else it is measured.
    """

    check: bool = True
    force: bool = False
    atol: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        refuse_misfit_fields(self)
        check_choices(self)
        check_tolerance(self.atol, self.rtol)


@dataclass(frozen=True, kw_only=True)
class AdapterDirectoryOptions(AdapterOptions):
    """The options of the export of adapters' directories: those of `AdapterOptions`, and what to load.

    Args:
        base: the base model's directory; by default the directory that the graph was exported from.
        combination: how weighted adapters are combined; see `AdaptedModel.add_weighted_adapter`.
    """

    base: str | Path | None = None
    combination: Literal["cat", "linear"] = CAT


class AdapterChanges(TypedDict, total=False):
    """The fields of `AdapterOptions` by name, for type checkers."""

    check: bool
    force: bool
    atol: float | None
    rtol: float | None


class AdapterDirectoryChanges(AdapterChanges, total=False):
    """The fields of `AdapterDirectoryOptions` by name, for type checkers."""

    base: str | Path | None
    combination: Literal["cat", "linear"]
