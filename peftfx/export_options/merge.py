"""MergeOptions: what may be asked of a merge into a transformers directory, checked whole when it is made."""

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
    """What may be asked of a merge into a transformers directory.

    Args:
        adapter: a HF PEFT directory; without one the base is written, a quantised one in floating point.
        task: name of a pipeline; by default the adapter's or the model's.
        task_id: the number of the task to merge, of an adapter that acts by `task_ids` (Poly).
        dtype: `fp32`, `fp16` or `bf16`, of the weights, which are merged in fp32 and rounded once; by default the
            base's own, and fp32 for a quantised base, which no code of it is rounded to.
        quantize_base: `nf4` makes of a base in floating point what `load_in_4bit` makes of it, ahead of the merge.
        quantize: `nf4`, `int4` or `int8`, by role too, as of `ExportOptions`: the merged weights are rounded, and the
            directory is bitsandbytes' (`nf4`) or compressed-tensors' (integers).
        max_error: what rounding may cost, as of `ExportOptions`.
        calibration: a file of text that the rounded model is compared on; by default the model's own greedy text. Under
            `int4(gptq=True)` weights are rounded by it, too, but for its last fifth.
        max_shard_size: bytes of a file of weights, as a number or as `5GB`.
        force: replace the directory if an export made it.

    Raises:
        PeftfxError: an option has another type or is none of its choices.
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
            raise PeftfxError("the size of a file of weights must be 1 byte or more", "max_shard_size", "as in 5GB")

    @property
    def bound(self) -> MaxError | None:
        """What rounding may cost, where somebody said it."""
        return MaxError.of(self.max_error)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """`quantize`, read."""
        found = () if self.quantize is None else parse_schemes(self.quantize)
        if found:
            check_directory_schemes(found)
        return found

    @property
    def shard(self) -> int:
        """`max_shard_size` in bytes."""
        size = self.max_shard_size
        return parse_size(size, "max_shard_size") if isinstance(size, str) else size

    @property
    def folders(self) -> dict[str, Path]:
        """The adapter's directory, by its name."""
        return {} if self.adapter is None else {"default": Path(self.adapter)}


class MergeChanges(TypedDict, total=False):
    """Options of `MergeOptions` by name, for type checkers."""

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
