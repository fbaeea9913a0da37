"""Multitask prompt tuning: a prompt that tasks share, times a low-rank product for each task (arXiv:2303.02861).

The virtual tokens of a row of task `t` are `P * (U_t V_t)`. The tasks share `P` [num_virtual_tokens, token_dim]; each
task has `U` [num_virtual_tokens, num_ranks] and `V` [num_ranks, token_dim]. A call gives the rows' tasks as `task_ids`.
With a single task there is a single prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftfx.contract.common.bounds import refuse_below
from peftfx.contract.method import Params
from peftfx.contract.sequence import PROMPT
from peftfx.errors import PeftfxError, first_line
from peftfx.methods.prompt_tuning import PromptTuning
from peftfx.sites.site import SequenceSite

COLUMNS, ROWS, TASKS = "prefix_task_cols", "prefix_task_rows", "task_ids"
Starts = Literal["RANDOM", "SAMPLE_VOCAB", "TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"]
_AVERAGE, _EXACT, _SHARED = "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(PromptTuning):
    """Virtual tokens that depend on each row's task.

    Args:
        num_tasks: the number of tasks. With more than one task, calls give each row's task: `task_ids`, [batch].
        num_ranks: the rank of a task's product.
        prompt_tuning_init: as for prompt tuning; or from another adapter's file: the mean of its tasks
            (AVERAGE_SOURCE_TASKS), one of its tasks (EXACT_SOURCE_TASK), or only the shared prompt
            (ONLY_SOURCE_SHARED).
        prompt_tuning_init_state_dict_path: the path of that file, in safetensors format.
        prompt_tuning_init_task: the number of the task for EXACT_SOURCE_TASK.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.MultitaskPromptTuning(num_virtual_tokens=8, num_tasks=2))
        >>> logits = adapted(input_ids=torch.tensor([[3, 5, 8]]), task_ids=torch.tensor([1])).logits
    """

    prompt_tuning_init: Starts = "RANDOM"  # type: ignore[assignment]
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(1, self, "num_ranks", "num_tasks")
        if self._has_source and not self.prompt_tuning_init_state_dict_path:
            what = f"prompt_tuning_init={self.prompt_tuning_init!r} needs a source"
            raise PeftfxError(what, "prompt_tuning_init_state_dict_path", "give it, or start at 'RANDOM'")

    @property
    def _has_source(self) -> bool:
        return self.prompt_tuning_init in (_AVERAGE, _EXACT, _SHARED)

    @property
    def doubt(self) -> str:
        if self.num_transformer_submodules != 2:
            return ""
        return (
            "peft puts half of this prompt before the decoder's text in calls with labels, as in training, and leaves "
            "it out in `generate`; here it is always left out, so a loss is not peft's"
        )

    @property
    def inputs(self) -> Mapping[str, int]:
        return {TASKS: self.num_tasks}

    def settled(self, values: Mapping[str, int]) -> MultitaskPromptTuning:
        return dataclasses.replace(self, num_tasks=1) if TASKS in values else self

    def settle(self, p: Params, values: Mapping[str, int]) -> dict[str, Tensor]:
        own = {name: p[name][values[TASKS]][None] for name in (COLUMNS, ROWS)} if TASKS in values else {}
        return {**p, **own}

    def init(self, site: SequenceSite, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        plain = dataclasses.replace(self, prompt_tuning_init="RANDOM") if self._has_source else self
        p = super(MultitaskPromptTuning, plain).init(site, embed, rng)
        for name in (COLUMNS, ROWS):
            p[name] = p[PROMPT].new_empty(self.written_shapes()[name]).normal_(std=0.02, generator=rng)
        return p | self._source(p) if self._has_source else p

    def _source(self, p: Params) -> dict[str, Tensor]:
        """Return the tensors that the source's file has for these parameters."""
        path = str(self.prompt_tuning_init_state_dict_path)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            what = f"cannot be read: {first_line(error)}"
            raise PeftfxError(what, path, "give the adapter_model.safetensors of a prompt of tasks") from error
        made = {}
        for name in (PROMPT,) if self.prompt_tuning_init == _SHARED else (PROMPT, COLUMNS, ROWS):
            value = found.get(name, torch.empty(0))
            if name != PROMPT and len(value):
                number = self.prompt_tuning_init_task
                if self.prompt_tuning_init == _EXACT and not 0 <= number < len(value):
                    what = f"the source has {len(value)} tasks, from 0, and none has the number {number}"
                    raise PeftfxError(what, "prompt_tuning_init_task", f"from 0 to {len(value) - 1}")
                one = value[number] if self.prompt_tuning_init == _EXACT else value.mean(0)
                value = one.expand(self.num_tasks, *one.shape)
            if value.shape != p[name].shape:
                what = f"{name} is {list(value.shape)} there, and {list(p[name].shape)} here"
                raise PeftfxError(what, path, "give the options that the source has")
            made[name] = value.to(p[name]).contiguous()
        return made

    def written(self, p: Params) -> dict[str, Tensor]:
        return {name: p[name] for name in (PROMPT, COLUMNS, ROWS)}

    def written_shapes(self) -> Mapping[str, tuple[int, ...]]:
        count, width = self.saved_shape()
        columns, rows = (self.num_tasks, count, self.num_ranks), (self.num_tasks, self.num_ranks, width)
        return {PROMPT: (count, width), COLUMNS: columns, ROWS: rows}

    def virtual(self, p: Params, training: bool) -> Tensor:
        if self.num_tasks == 1:
            columns, rows = p[COLUMNS][0], p[ROWS][0]
        else:
            columns, rows = (p[name].index_select(0, p[TASKS].to(p[name].device)) for name in (COLUMNS, ROWS))
        count = self.num_virtual_tokens
        return p[PROMPT][:count] * (columns[..., :count, :] @ rows)
