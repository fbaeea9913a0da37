"""The options of a merge into a transformers directory, checked as a whole when an object is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from peftfx.bases.tasks import check_task
from peftfx.errors import PeftfxError
from peftfx.export_options.checked import Checked, check_task_id
from peftfx.export_options.quantize import Scheme, check_calibration, check_directory_schemes, parse_schemes
from peftfx.export_options.values import MaxError, refuse_idle_bounds
from peftfx.field_types import refuse_misfit_fields
from peftfx.options import check_choices, parse_size


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Checked):
    """The options of a merge into a transformers directory.

    Args:
        adapter: a HF PEFT directory. Without an adapter, the base is written; a quantised base in floating point.
        task: the name of a pipeline; by default the adapter's or the model's task.
        task_id: the number of the task to merge, for an adapter that acts by `task_ids` (Poly).
        dtype: the dtype of the weights: `fp32`, `fp16` or `bf16`. They are merged in fp32, and rounded once. By default
            it is the base's own dtype, but fp32 for a quantised base, in which its dequantised weights are not rounded.
        quantize_base: `nf4` quantises a floating-point base like `load_in_4bit` before the merge.
        quantize: round the merged weights: `nf4`, `int4` or `int8`, also by role, as in `ExportOptions`. The directory
            has the format of bitsandbytes (`nf4`) or of compressed-tensors (integers).
        max_error: the bound on the error of rounding, as in `ExportOptions`.
        calibration: a text file on which the rounded model is compared; by default the model's own greedy text. With
            `int4(gptq=True)`, GPTQ uses this text as well, except for its last fifth.
        max_shard_size: the most bytes of a file of weights, as a number or as text such as `5GB`.
        force: replace the directory if an export made it.

    Raises:
        PeftfxError: an option has a wrong type or an unknown value.
    """

    adapter: str | Path | None = None
    task: str | None = None
    task_id: int | None = None
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    quantize_base: Literal["nf4"] | None = None
    quantize: str | None = None
    max_error: float | str | None = None
    calibration: str | Path | None = None
    max_shard_size: int | str = "5GB"
    force: bool = False

    def __post_init__(self) -> None:
        refuse_misfit_fields(self)
        check_choices(self)
        if self.task is not None:
            check_task(self.task)
        check_task_id(self.task_id, self.folders)
        refuse_idle_bounds(self.quantize is not None, max_error=self.max_error, calibration=self.calibration)
        _ = self.bound
        check_calibration(self.schemes, self.calibration)
        if self.shard < 1:
            what = "the size of a file of weights must be 1 byte or more"
            raise PeftfxError(what, "max_shard_size", "pass a size such as 5GB")

    @property
    def bound(self) -> MaxError | None:
        """The bound on the error of rounding, if one is given."""
        return MaxError.of(self.max_error)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes in `quantize`."""
        found = () if self.quantize is None else parse_schemes(self.quantize)
        if found:
            check_directory_schemes(found)
        return found

    @property
    def shard(self) -> int:
        """The limit `max_shard_size` in bytes."""
        size = self.max_shard_size
        return parse_size(size, "max_shard_size") if isinstance(size, str) else size

    @property
    def folders(self) -> dict[str, Path]:
        """The adapter's directory, by its name."""
        return {} if self.adapter is None else {"default": Path(self.adapter)}


class MergeChanges(TypedDict, total=False):
    """The fields of `MergeOptions` by name, for type checkers."""

    adapter: str | Path | None
    task: str | None
    task_id: int | None
    dtype: Literal["fp32", "fp16", "bf16"] | None
    quantize_base: Literal["nf4"] | None
    quantize: str | None
    max_error: float | str | None
    calibration: str | Path | None
    max_shard_size: int | str
    force: bool
