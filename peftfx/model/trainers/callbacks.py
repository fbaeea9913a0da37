"""Callbacks of transformers' `Trainer`: ranks in each training step, adapters in checkpoints, memory in the logs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftfx.errors import PeftfxError
from peftfx.model.adapted import AdaptedModel


class RankAllocation(TrainerCallback):
    """A callback that calls `update_and_allocate` in each step of `transformers.Trainer` (`callbacks=`).

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.AdaLoRA(init_r=12, target_r=8, total_step=1000))
        >>> callbacks = [peftfx.RankAllocation()]  # for `Trainer(model=adapted, callbacks=callbacks, ...)`
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Reallocate ranks after the optimizer's step, while there are gradients."""
        _adapted(kwargs["model"]).update_and_allocate(state.global_step)


class AdapterInCheckpoints(TrainerCallback):
    """A callback that writes the adapters into each checkpoint of `transformers.Trainer`, too (`callbacks=`).

    `Trainer` writes of an adapted model its tensors alone, from which it resumes. With this callback a checkpoint is
    also a directory of HF PEFT, as that of a `PeftModel` is: `peftfx.load`, `peft` and `peftfx export` read it.

    Examples:
        >>> callbacks = [peftfx.AdapterInCheckpoints()]  # for `Trainer(model=adapted, callbacks=callbacks, ...)`
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the adapters beside what `Trainer` has just saved. Each process of several calls this.

        Args:
            args, state, control: as `Trainer` gives them to each callback.
            kwargs: the model among them.

        Raises:
            PeftfxError: the trainer has another model, or searches hyperparameters.
        """
        model = _adapted(kwargs["model"])
        if state.is_hyper_param_search:
            what = "the runs of a search have folders of their own, and no callback is told which"
            raise PeftfxError(what, "callbacks", "leave AdapterInCheckpoints out of the search")
        model.save_pretrained(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


class MemoryInLogs(TrainerCallback):
    """A callback that adds `peak_memory_gb` to what `transformers.Trainer` logs and prints (`callbacks=`).

    Examples:
        >>> callbacks = [peftfx.MemoryInLogs()]  # for `Trainer(model=adapted, callbacks=callbacks, ...)`
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Add the peak memory to the logs before they are printed."""
        if logs is not None:
            logs["peak_memory_gb"] = round(peak_memory(), 3)


def _adapted(model: object) -> AdaptedModel:
    if not isinstance(model, AdaptedModel):
        what = f"this callback is for an AdaptedModel, and the trainer has a {type(model).__name__}"
        raise PeftfxError(what, "callbacks", "train what peftfx.transform returned")
    return model


def peak_memory() -> float:
    """Return the most memory that this process has used, in 10^9 bytes: of its GPU if there is one, else of the host.

    The result is 0 if the system does not report memory.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # on Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e9 if sys.platform == "darwin" else most * 1024 / 1e9
