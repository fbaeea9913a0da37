"""The options of the export of a base model's directory, checked as a whole when an object is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peftfx.bases.tasks import check_task
from peftfx.errors import PeftfxError
from peftfx.export_options.checked import check_task_id
from peftfx.export_options.export import ExportChoices, ExportOptions


@dataclass(frozen=True, kw_only=True)
class DirectoryOptions(ExportOptions):
    """The options of the export of a base model's directory: those of `ExportOptions`, and what to load.

    Args:
        adapter: a HF PEFT directory; without an adapter, the base is exported.
        batched: HF PEFT directories by name. Each row of a batch chooses one of them.
        task: the name of a pipeline; by default the adapter's or the model's task.
        task_id: the number of the task to export, for an adapter that acts by `task_ids` (Poly, multitask prompts). If
            it is left out with `batched`, rows choose among all tasks, which are named `NAME_0` and so on.
        dtype: the dtype of the weights: `fp32`, `fp16` or `bf16`. They are merged in fp32, and rounded once. By default
            it is the base's own dtype, but fp32 for a bfloat16 base, because ONNX Runtime's CPU provider has no kernels
            for bfloat16. A quantised base is served in fp32.
        quantize_base: `nf4` quantises a floating-point base like `load_in_4bit`, on which a QLoRA was trained.
    """

    adapter: str | Path | None = None
    batched: Mapping[str, str | Path] = field(default_factory=dict, hash=False)
    task: str | None = None
    task_id: int | None = None
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    quantize_base: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "batched", dict(self.batched))
        if self.task is not None:
            check_task(self.task)
        if self.adapter is not None and self.batched:
            what = "adapter and batched are both given"
            raise PeftfxError(
                what, f"adapter, batched: {self.adapter}", "name the adapter with the others: --batched NAME=DIR"
            )
        check_task_id(self.task_id, self.folders)
        if self.adapter is not None and self.slots is not None:
            what = "a graph for swappable adapters is made from the base only"
            hint = "leave the adapter out, and write it to its own file with export-adapter"
            raise PeftfxError(what, f"adapter, slots: {self.adapter}", hint)
        if self.rounds and self.dtype == "bf16":
            raise PeftfxError("weights in bfloat16 are not quantised", "quantize, dtype", "pass dtype='fp32' or 'fp16'")
        if self.quantize_base is not None and self.dtype not in (None, "fp32"):
            what = f"the operators for a quantised base's codes compute in fp32, not in {self.dtype}"
            raise PeftfxError(what, "quantize_base, dtype", "leave dtype out")

    @property
    def folders(self) -> dict[str, Path]:
        """The directories of all adapters, by name."""
        alone = {} if self.adapter is None else {"default": Path(self.adapter)}
        return alone | {name: Path(folder) for name, folder in self.batched.items()}


class DirectoryChanges(ExportChoices, total=False):
    """The fields of `DirectoryOptions` by name, for type checkers."""

    adapter: str | Path | None
    batched: Mapping[str, str | Path]
    task: str | None
    task_id: int | None
    dtype: Literal["fp32", "fp16", "bf16"] | None
    quantize_base: Literal["nf4"] | None
