"""The model that a training adapts: the base, with a new head if the rows have classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftfx.bases.config_fields import length_of
from peftfx.bases.dtypes import kinds_of
from peftfx.bases.files.folder import weight_files
from peftfx.bases.files.gguf import stood_for
from peftfx.bases.load import load_base
from peftfx.bases.tasks import task_of
from peftfx.errors import PeftfxError, warn
from peftfx.training.rows import CLASSES, TrainingRows

_WRITERS = ("text-generation", "text2text-generation", "image-text-to-text")  #: the tasks of models that write texts
_CLASSIFIES = "text-classification"


@dataclass(frozen=True)
class Learner:
    """A base that is ready to be adapted.

    Attributes:
        model: the base.
        saved: the paths of new modules, which are trained whole.
    """

    model: nn.Module
    saved: tuple[str, ...]

    @property
    def sourced(self) -> bool:
        """Whether the model reads one text, and writes another: an encoder-decoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def most(self, asked: int, tokenizer: Any) -> int:
        """Return the most tokens of a row: as many as are asked for, and as the model and its tokenizer take."""
        told = (length_of(self.model.config), getattr(tokenizer, "model_max_length", None))
        return min(asked, *(number for number in told if isinstance(number, int)))


def learner(directory: Path, rows: TrainingRows) -> Learner:
    """Return the base in a directory as a model that can learn from these rows.

    Args:
        directory: the directory of the base.
        rows: the rows.

    Raises:
        PeftfxError: the base cannot be loaded, or cannot learn from rows of this kind.
    """
    if rows.kind != CLASSES:
        model = load_base(directory)
        if (task := task_of(model)) not in _WRITERS:
            what = f"rows of {rows.kind} are for a model that writes texts, and this one does {task}"
            raise PeftfxError(what, str(directory), "give a base that writes texts, or rows of text and label")
        return Learner(model, ())
    labels = rows.labels
    if len(labels) < 2:
        raise PeftfxError(f"all rows have the label {labels[0]!r}", rows.where, "give rows of two classes or more")
    bare = load_base(directory, task=_CLASSIFIES, num_labels=len(labels), weights=False)
    head = _head(bare) | _left_out(bare, directory)
    model = load_base(directory, task=_CLASSIFIES, num_labels=len(labels), given=head)
    if new := sorted({name.rpartition(".")[0] for name in head - _head(bare)}):
        warn(f"the base has no weights of {', '.join(new)}: they are new, and are trained and saved with the head")
    return Learner(model, tuple(sorted({name.rpartition(".")[0] for name in head})))


def _head(bare: nn.Module) -> set[str]:
    """Return the names of the parameters of a model that are not its backbone's."""
    prefix = str(getattr(bare, "base_model_prefix", ""))
    return {name for name, _ in bare.named_parameters() if not name.startswith(f"{prefix}.")}


def _left_out(bare: nn.Module, directory: Path) -> set[str]:
    """Return the names of parameters in whole parts of the backbone that the base's files do not have.

    A masked language model, for example, has no pooler. The part is new, and is trained with the head. Where the files
    name the rest otherwise than the model, nothing tells what they lack.
    """
    prefix = str(getattr(bare, "base_model_prefix", ""))
    backbone = getattr(bare, prefix, None)
    if stood_for(directory) is not None or not isinstance(backbone, nn.Module):
        return set()
    stored = {name.removeprefix(f"{prefix}.") for name in kinds_of(weight_files(directory))}
    lacking = {name for name, _ in backbone.named_parameters() if name not in stored}
    parts = {name.partition(".")[0] for name in lacking}
    whole = all(name in lacking for name, _ in backbone.named_parameters() if name.partition(".")[0] in parts)
    return {f"{prefix}.{name}" for name in lacking} if whole and len(lacking) < len(stored) else set()
