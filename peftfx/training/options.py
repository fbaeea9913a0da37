"""The options of a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftfx.errors import PeftfxError, shown


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of a training.

    Args:
        epochs: how many times each row is seen.
        steps: the number of optimizer steps, in place of epochs; -1 means that `epochs` counts.
        learning_rate, batch_size: as in transformers' `TrainingArguments`; the learning rate falls linearly to 0.
        max_length: the most tokens of a row; further tokens are cut off.
        seed: the seed of the adapter's initial values, of the order of rows and of dropout.
        evaluate: a file of rows whose loss is computed after each epoch.
        resume: whether to go on from the last checkpoint of a run that was stopped.
        save_steps: the number of steps between two checkpoints; 0 means no checkpoints.
        force: whether to replace an existing output.
    """

    epochs: float = 1.0
    steps: int = -1
    learning_rate: float = 2e-4
    batch_size: int = 8
    max_length: int = 512
    seed: int = 0
    evaluate: Path | None = None
    resume: bool = False
    save_steps: int = 500
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        wrong = [name for name in ("epochs", "learning_rate") if not 0 < getattr(self, name) < float("inf")]
        wrong += [name for name in ("batch_size", "max_length") if getattr(self, name) < 1]
        wrong += ["steps"] if self.steps == 0 or self.steps < -1 else []
        wrong += ["save_steps"] if self.save_steps < 0 else []
        if wrong:
            raise PeftfxError(f"{wrong[0]} cannot be {getattr(self, wrong[0])}", wrong[0], "give a number above 0")
        if not 0 <= self.seed < 2**32:  # what numpy takes
            raise PeftfxError(f"seed cannot be {shown(self.seed)}", "seed", "give a number from 0 to 4294967295")
