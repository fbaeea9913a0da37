"""Options and forwards of TRL's trainers that do not work with an adapted model: refused when a trainer is made."""

from __future__ import annotations

from peftfx.hosting.other_forward import refuse_passed_by
from peftfx.model.by_name import AdaptersByName
from peftfx.model.trainers.seen_by_trainers import no_mixing
from peftfx.views.prefix import Prefix, no_checkpointing


def refuse_options(model: AdaptersByName, args: object) -> None:
    """Refuse what would end a trainer's training later: at the first step, or at the first renewal.

    These are options, and a forward that the trainer has set on the model and that does not run its adapters.

    Args:
        model: the adapted model.
        args: the trainer's arguments; anything else is ignored.

    Raises:
        PeftfxError: one of these options is on, or an adapter would be skipped.
    """
    if "forward" in vars(model):
        refuse_passed_by(model.modules_road, model.named.called, entered=model.road == "modules")
    if getattr(args, "sync_ref_model", False):
        raise no_mixing()
    checkpoints = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    if checkpoints and model.road == "modules":
        prompts = (p for adapter in model.named.acting() for p in adapter.placements.prompts)
        if any(isinstance(p.method.entry(model.base, p.site), Prefix) for p in prompts):
            raise no_checkpointing(model.base)
