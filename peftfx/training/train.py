"""The function `train`: makes an adapter from a base, rules and a file of rows, by transformers' Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftfx.bases.files.folder import read_base_config
from peftfx.bases.files.gguf import as_directory
from peftfx.bases.labels import write_labels
from peftfx.bases.processors.padding import padding_of
from peftfx.bases.tasks import PEFT_TASKS, task_of
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError, warn
from peftfx.export.writing.atomic_directory import check_output, publish
from peftfx.export.writing.earlier_output import FILES, files_in, listed_in
from peftfx.formats import RULES
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import transform
from peftfx.pages.plot import plot
from peftfx.rules.peft_files import CONFIG, rule_folders
from peftfx.rules.text import parse_rules
from peftfx.training.checkpoints import (
    is_at_end,
    last_checkpoint,
    room_for,
    rules_in_words,
    rules_keeper,
    take_end,
)
from peftfx.training.learners import learner
from peftfx.training.options import TrainOptions
from peftfx.training.rows import CLASSES, Padded, TrainingRows, encoded, read_rows
from peftfx.training.trainer import silent_trainer, trainer_arguments

_STATE = "trainer_state.json"  #: in each checkpoint of `Trainer`
_TOLD = "training/losses.json"  #: in an adapter's directory: how it was trained, and the files that were written


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        output: the adapter's directory.
        kind: the kind of the rows.
        rows, steps, parameters: the numbers of rows, of optimizer steps, and of trained parameters.
        loss: the mean loss over the training.
        evaluation: the loss on the rows of `TrainOptions.evaluate` at the end, by its name; empty without such rows.
        losses: each step with its loss.
    """

    output: str
    kind: str
    rows: int
    steps: int
    parameters: int
    loss: float
    evaluation: Mapping[str, float]
    losses: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        told = "".join(f", {name} {value:.4f}" for name, value in self.evaluation.items())
        count = f"{self.parameters:,} parameters, {self.steps} steps on {self.rows} rows of {self.kind}"
        return f"{self.output}: {count}; loss {self.loss:.4f}{told}"


def train(
    base: Path,
    data: Path,
    rules: str,
    output: Path,
    asked: TrainOptions,
    progress: Callable[[str], object] | None = None,
) -> Trained:
    """Train an adapter. Its directory appears when training is done, with the losses and their plot in `training`.

    Args:
        base: the directory of the base model, or a GGUF file.
        data: a file of JSON lines; see `peftfx.training.rows`.
        rules: the rules as text.
        output: the directory to write. Checkpoints are beside it, in `OUTPUT-checkpoints`.
        asked: the options.
        progress: called with a line when a stage begins.

    Raises:
        PeftfxError: an input is wrong; only checkpoints are left.
    """
    say = progress or (lambda line: None)
    check_output(output, asked.force, _of_training)
    parse_rules(rules)
    rows = read_rows(data)
    held = None if asked.evaluate is None else read_rows(asked.evaluate)
    if held is not None and held.kind != rows.kind:
        raise PeftfxError(f"rows of kind {held.kind}, and {rows.kind} to train on", held.where, "give rows of one kind")
    trainer_class = silent_trainer()
    with as_directory(base) as directory, publish(output, asked.force, _of_training) as made:
        return _train(directory, base, rows, held, rules, output, made, asked, say, trainer_class)


def _train(
    directory: Path,
    base: Path,
    rows: TrainingRows,
    held: TrainingRows | None,
    rules: str,
    output: Path,
    made: Path,
    asked: TrainOptions,
    say: Callable[[str], object],
    trainer_class: Any,
) -> Trained:
    read_base_config(directory)
    tokenizer = _tokenizer(directory)
    say("load")
    torch.manual_seed(asked.seed)
    learning = learner(directory, rows)
    model, most = learning.model, learning.most(asked.max_length, tokenizer)
    if directory != base:
        setattr(model.config, "_name_or_path", str(base))  # noqa: B010 - the base's name in the adapter's file
    methods = parse_rules(rules)
    if learning.saved:
        methods = (dataclasses.replace(methods[0], modules_to_save=learning.saved), *methods[1:])
    given = [found for found in (rows, held) if found is not None]
    sets = [encoded(found, tokenizer, most, rows.labels, sourced=learning.sourced) for found in given]
    if most < asked.max_length and any(len(row["input_ids"]) == most for row in sets[0]):
        warn(f"rows are cut to {most} tokens, the most that the model takes, and not to {asked.max_length}")
    adapted = transform(model, methods, seed=asked.seed)
    say("train")
    checkpoints, words = output.with_name(f"{output.name}-checkpoints"), rules_in_words(methods)
    last = last_checkpoint(checkpoints, words, adapted.state_dict()) if asked.resume else None
    trainer = trainer_class(
        model=adapted,
        args=trainer_arguments(asked, checkpoints, held is not None),
        train_dataset=sets[0],
        eval_dataset=sets[1] if held is not None else None,
        data_collator=Padded(padding_of(tokenizer) or 0),
        callbacks=[rules_keeper(words)],
    )
    with understanding(rows.where, "training stopped", "pass --verbose to see where; or give other rows or rules"):
        if last is not None and is_at_end(last, asked.steps):
            take_end(trainer, last)
        else:
            with room_for(checkpoints, adapted.state_dict()):
                trainer.train(resume_from_checkpoint=last)
        evaluation = {k: v for k, v in (trainer.evaluate() if held else {}).items() if k == "eval_loss"}
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    _refuse_divergence(adapted, losses)
    mean = sum(loss for _, loss in losses) / max(1, len(losses))
    parameters = adapted.get_nb_trainable_parameters()[0]
    told = Trained(
        *(str(output), rows.kind, len(rows.items), int(trainer.state.global_step), parameters, mean),
        evaluation=evaluation,
        losses=losses,
    )
    _write(made, adapted, tokenizer, told, rows)
    return told


def _refuse_divergence(adapted: AdaptedModel, losses: Sequence[tuple[int, float]]) -> None:
    """Refuse an adapter with values that are no numbers.

    Raises:
        PeftfxError: a loss or a trained value is not finite.
    """
    step = next((step for step, loss in losses if not math.isfinite(loss)), None)
    state = {n: value for n, value in adapted.state_dict().items() if value.is_floating_point()}
    broken = next((name for name, value in state.items() if not value.isfinite().all()), "")
    if step is not None or broken:
        at = "" if step is None else f": the loss of step {step} is no finite number"
        raise PeftfxError(f"the training diverged{at}", broken or "loss", "pass a smaller --learning-rate")


def _write(made: Path, adapted: AdaptedModel, tokenizer: Any, told: Trained, rows: TrainingRows) -> None:
    of_task = {task: kind for kind, task in PEFT_TASKS.items()}
    for name in adapted.names():  # so that an export and `peft` find the task in the file
        adapted.adapter(name).records.setdefault("task_type", of_task.get(task_of(adapted.base)))
    adapted.save_pretrained(made)
    if rows.kind == CLASSES:
        write_labels(made, rows.labels)
    tokenizer.save_pretrained(made)
    folder = (made / _TOLD).parent
    folder.mkdir()
    (folder / "loss.svg").write_text(plot(told.losses, "loss", "step"), encoding="utf-8")
    record = {**dataclasses.asdict(told), FILES: [*files_in(made), _TOLD]}
    (made / _TOLD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    with understanding(base, "cannot load the tokenizer"):
        return AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)


def _of_training(directory: Path) -> Collection[str] | None:
    """Return the files of an adapter; None if there is none, or if the directory has checkpoints or other adapters."""
    if not any((directory / name).is_file() for name in (CONFIG, RULES)):
        return None
    below = [path for path in directory.iterdir() if any((path / name).is_file() for name in (CONFIG, RULES, _STATE))]
    if not {*below} <= {*rule_folders(directory)}:
        return None
    return listed_in(directory, _TOLD)
