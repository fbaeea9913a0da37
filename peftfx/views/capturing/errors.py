"""What is told when a model's code cannot be captured."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from peftfx.errors import PeftfxError, first_line
from peftfx.graph.capturing.size_conditions import line_of
from peftfx.views.entry import Entry


def capture_error(model: nn.Module, error: BaseException, entry: Entry | None) -> PeftfxError:
    """Return the error for a model whose code raised an error in a capture, perhaps under a soft prompt."""
    why, hint, line = first_line(error), "see `__cause__` for torch.export's own report", line_of(error)
    # A set or a dict of sizes, or of numbers in a tensor, cannot be made.
    hashed = isinstance(error, TypeError) and "SymInt" in str(error)
    if hashed or "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        why = "its code branches on the values of a tensor"
        hint = "pass arguments or a config that avoid the branch; `__cause__` is torch.export's own report"
        if _loops_over_experts(model):
            hint = "its code loops over the chosen experts: call model.set_experts_implementation('grouped_mm')"
    elif str(error).strip():
        line = ""  # the message says it
    what = "cannot capture this model" if entry is None else "cannot capture this model under a soft prompt"
    return PeftfxError(f"{what}: {why}{', at ' if line else ''}{line}", type(model).__name__, hint)


def _loops_over_experts(model: nn.Module) -> bool:
    chosen = getattr(getattr(model, "config", None), "_experts_implementation", None)
    return chosen == "eager" and isinstance(model, PreTrainedModel) and bool(model._can_set_experts_implementation())
