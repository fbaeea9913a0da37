"""transformers' Trainer, as a training uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peftfx.errors import PeftfxError
from peftfx.training.options import TrainOptions


def trainer_arguments(asked: TrainOptions, checkpoints: Path, evaluates: bool) -> Any:
    """Return transformers' `TrainingArguments` for these options; checkpoints are in a folder of their own."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=asked.epochs,
        max_steps=asked.steps,
        learning_rate=asked.learning_rate,
        per_device_train_batch_size=asked.batch_size,
        per_device_eval_batch_size=asked.batch_size,
        seed=asked.seed,
        data_seed=asked.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would tell other losses for those that are no numbers
        save_strategy="steps" if asked.save_steps else "no",
        save_steps=asked.save_steps or 500,
        save_total_limit=1,
        eval_strategy="epoch" if evaluates else "no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
    )


def silent_trainer() -> Any:
    """Return a class of transformers' Trainer that prints nothing.

    Raises:
        PeftfxError: a package that Trainer needs is not installed.
    """
    try:
        import accelerate  # noqa: F401
        from transformers import Trainer
    except ImportError as error:
        what = f"transformers' Trainer cannot be imported: {error}"
        raise PeftfxError(what, "train", "pip install 'peftfx[train]'") from error

    class Silent(Trainer):
        """A Trainer that keeps the losses for the end, and does not print them during training."""

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            self.state.log_history.append({**logs, "step": self.state.global_step})

    return Silent
