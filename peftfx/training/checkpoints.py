"""Checkpoints of a training: each tells the rules that it was trained by, and goes on by no others."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from peftfx.contract.method import Method
from peftfx.errors import PeftfxError
from peftfx.files import is_file
from peftfx.rules.text import write_rule

_RULES, _WEIGHTS = "rules.txt", "model.safetensors"
_OTHERS = 1 << 16  #: bytes of a checkpoint beside the adapter and the optimizer's two moments of it


def rules_in_words(methods: Sequence[Method]) -> str:
    """Return rules as text, the same for the same rules however they were typed."""
    return "; ".join(map(write_rule, methods))


@contextlib.contextmanager
def room_for(checkpoints: Path, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Tell of a disk that is too full for a checkpoint. torch tells of it as of a broken file.

    Args:
        checkpoints: the folder of all checkpoints.
        state: the tensors of the adapter.

    Raises:
        PeftfxError: the block fails, and the disk has no room.
    """
    try:
        yield
    except Exception as error:
        needed = 3 * sum(tensor.nbytes for tensor in state.values()) + _OTHERS
        free = shutil.disk_usage(next(path for path in (checkpoints, *checkpoints.parents) if path.exists())).free
        if checkpoints.exists() and free < needed:
            what = f"a checkpoint cannot be written: {free:,} bytes are free, {needed:,} are needed"
            raise PeftfxError(what, str(checkpoints), "free space, or pass --save-steps 0") from error
        raise


def last_checkpoint(checkpoints: Path, rules: str, state: Mapping[str, Tensor]) -> str:
    """Return the folder of the last checkpoint.

    Args:
        checkpoints: the folder of all checkpoints.
        rules: the rules that are asked for, as `rules_in_words` writes them.
        state: the tensors of the adapter that these rules make.

    Raises:
        PeftfxError: there is no checkpoint, it cannot be read, or it was trained by other rules.
    """
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if found is None:
        raise PeftfxError("there is no checkpoint to go on from", str(checkpoints), "leave --resume out")
    hint = "give --resume the same --rules; or leave --resume out, to begin again"
    path = Path(found) / _RULES
    if is_file(path) and (own := path.read_text(encoding="utf-8")) != rules:
        raise PeftfxError(f"the checkpoint was trained by the rules {own}, and not by {rules}", found, hint)
    if not _fits(Path(found) / _WEIGHTS, state):
        raise PeftfxError(f"the checkpoint has other tensors than an adapter by the rules {rules}", found, hint)
    return str(found)


def _fits(path: Path, state: Mapping[str, Tensor]) -> bool:
    """Return whether all tensors of a file are of this state, as far as there is such a file."""
    if not is_file(path):
        return True
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        what = f"the checkpoint cannot be read: {error}"
        raise PeftfxError(what, str(path), "remove its folder, and --resume goes on from the one before it") from error
    return all(name in state and tuple(state[name].shape) == shape for name, shape in shapes.items())


def is_at_end(checkpoint: str, steps: int) -> bool:
    """Say whether a checkpoint has all steps that are asked for; -1 asks for epochs, and Trainer itself sees their end.

    Raises:
        PeftfxError: it has more.
    """
    done = _state_in(checkpoint).global_step
    if 0 < steps < done:
        what = f"the checkpoint has {done} steps, and {steps} are asked for"
        raise PeftfxError(what, checkpoint, "pass more --steps; or leave --resume out, to begin again")
    return steps == done


def take_end(trainer: Any, checkpoint: str) -> None:
    """Give a trainer the adapter and the losses of a checkpoint after whose steps none are left.

    Trainer itself would take one more step.
    """
    trainer.model.load_state_dict(load_file(Path(checkpoint) / _WEIGHTS), strict=False)
    trainer.state = _state_in(checkpoint)


def _state_in(checkpoint: str) -> Any:
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def rules_keeper(rules: str) -> Any:
    """Return a callback for transformers' Trainer that writes the rules into each checkpoint."""
    from transformers import TrainerCallback

    class Keeps(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **others: object) -> None:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _RULES).write_text(rules, encoding="utf-8")

    return Keeps()
