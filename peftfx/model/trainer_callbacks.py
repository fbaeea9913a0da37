"""Callbacks of transformers' `Trainer`: what a method does in each step of training, and what is told of it."""

from __future__ import annotations

import sys

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftfx.errors import PeftfxError
from peftfx.model.adapted import AdaptedModel


class RankAllocation(TrainerCallback):
    """Calls `update_and_allocate` in each step of `transformers.Trainer`; pass it as one of its `callbacks`."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """After the optimizer's step, while there are gradients."""
        model = kwargs["model"]
        if not isinstance(model, AdaptedModel):
            what = f"ranks are allocated in an AdaptedModel, not in a {type(model).__name__}"
            raise PeftfxError(what, "callbacks", "train what peftfx.transform returned")
        model.update_and_allocate(state.global_step)


class MemoryInLogs(TrainerCallback):
    """Adds `peak_memory_gb` to what `transformers.Trainer` logs and prints; pass it as one of its `callbacks`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Ahead of what prints the logs."""
        if logs is not None:
            logs["peak_memory_gb"] = round(peak_memory(), 3)


def peak_memory() -> float:
    """The most memory that this process has taken, in 10^9 bytes: of its GPU where it has one, or else of the host.

    Where the system does not tell, it is 0.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # as on Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e9 if sys.platform == "darwin" else most * 1024 / 1e9
