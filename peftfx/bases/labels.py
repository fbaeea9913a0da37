"""The names of a head's classes, for an adapter that brings a head, and random labels.

HF PEFT's files do not have the names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.errors import PeftfxError
from peftfx.files import is_file
from peftfx.formats import LABELS, read_stamped, with_version


def write_labels(directory: Path, labels: Sequence[str]) -> None:
    """Write the names of classes, in the order of their numbers, into an adapter's directory."""
    text = json.dumps(with_version(LABELS, {"labels": list(labels)}), indent=1)
    (directory / LABELS).write_text(text + "\n", encoding="utf-8")


def read_labels(directory: Path) -> list[str]:
    """Read the names of the classes of an adapter's head. Return no names if the directory has none.

    Raises:
        PeftfxError: the file is broken, or of a newer format.
    """
    path = directory / LABELS
    if not is_file(path):
        return []
    labels = read_stamped(path, "train the adapter again").get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise PeftfxError("the file has no list of labels", str(path), "train the adapter again, or delete this file")
    return labels


def name_labels(model: nn.Module, directories: Iterable[Path]) -> None:
    """Give the classes of a model's head the names in an adapter's directory.

    Raises:
        PeftfxError: the number of names is not the number of classes.
    """
    config: Any = getattr(model, "config", None)
    for directory in directories:
        if labels := read_labels(directory):
            if len(labels) != config.num_labels:
                what = f"the file has {len(labels)} labels, but the head has {config.num_labels} classes"
                raise PeftfxError(what, str(directory / LABELS), "delete this file, or name the adapter's own task")
            config.id2label, config.label2id = dict(enumerate(labels)), {own: i for i, own in enumerate(labels)}


def class_labels(config: object, batch: int, classes: int, random: torch.Generator) -> Tensor:
    """Return random labels for a classifier: a class of each, several classes of each, or numbers to come near to."""
    problem = first_of(config, "problem_type")
    if problem == "multi_label_classification":
        return torch.randint(2, (batch, classes), generator=random).float()
    if problem == "regression" or (problem is None and classes == 1):
        return torch.randn((batch, classes) if classes > 1 else (batch,), generator=random)
    return torch.randint(classes, (batch,), generator=random)
