"""What of TRL's trainers does not work with an adapted model, or costs too much: it is told when a trainer is made."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peftfx.errors import PeftfxError, warn
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
    if getattr(args, "teacher_model_kind", None) == "ema":
        what = "a teacher of this kind is a second model, into which the trainer mixes the parameters of a whole model"
        raise PeftfxError(what, "teacher_model_kind='ema'", "take 'live' or 'base'")
    checkpoints = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    if checkpoints and model.road == "modules":
        prompts = (p for adapter in model.named.acting() for p in adapter.placements.prompts)
        if any(isinstance(p.method.entry(model.base, p.site), Prefix) for p in prompts):
            raise no_checkpointing(model.base)


def warn_of_second_base(making: Mapping[str, object]) -> None:
    """Warn of a trainer that has got no model to compare with, and so loads the base a second time, from its files.

    For a `PeftModel` it does not do so: it asks whether the model's class is that one.

    Args:
        making: the names in the code that makes the trainer.
    """
    trainer, given = making.get("self"), making.get("ref_model")
    made = getattr(trainer, "ref_model", None)
    if isinstance(made, nn.Module) and made is not given and not isinstance(made, AdaptersByName):
        made_so = "make the trainer with beta=0.0, and then set trainer.beta and trainer.ref_model"
        _warn_of(trainer, "reference", "give ref_model= too" if "ref_model" in making else made_so)
    elif getattr(making.get("args"), "teacher_model_kind", None) == "base":
        made_so = "make the trainer with teacher_model_kind='live', and then set trainer.teacher_model"
        _warn_of(trainer, "teacher", made_so)


def _warn_of(trainer: object, role: str, hint: str) -> None:
    warn(
        f"{type(trainer).__name__} loads the base a second time, from its files, as the {role}: {hint}. "
        "model.reference() is the base without a copy, and model.reference(NAME) an adapter that was trained before; "
        "docs/coming-from-peft.md has the lines"
    )
