"""Callbacks of transformers' `Trainer`: what a method does in each step of training."""

from __future__ import annotations

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
