"""The rows of a JSON lines file as training data: texts, completions, chats, or labelled texts.

Each form of a row, and what is learnt from it:

{"text": ...}                                   the whole text
{"prompt": ..., "completion": ...}              the completion after the prompt
{"messages": [{"role": ..., "content": ...}]}   the last message of a chat, in the tokenizer's chat template
{"text": ..., "label": ...}                     the class of the text
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfx.bases.chats import filled_template
from peftfx.errors import PeftfxError, shown
from peftfx.files import is_file

_TEXT, COMPLETION, CHAT, CLASSES = "text", "completion", "chat", "classification"
_KINDS: Mapping[str, frozenset[str]] = {
    CLASSES: frozenset({"text", "label"}),
    COMPLETION: frozenset({"prompt", "completion"}),
    CHAT: frozenset({"messages"}),
    _TEXT: frozenset({"text"}),
}
_FORMS = "a row has one of: text; text and label; prompt and completion; or messages, the last of them the assistant's"
_ANSWER = {"role": "assistant", "content": ""}
IGNORED = -100  #: the label of tokens that the loss ignores
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a training file.

    Attributes:
        kind: the kind of the rows, one of `_KINDS`.
        items: the rows as they are in the file.
        where: the path of the file.
    """

    kind: str
    items: tuple[_Row, ...]
    where: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, sorted, whole numbers by their size; empty if the rows have no labels."""
        given = [row["label"] for row in self.items] if self.kind == CLASSES else []
        by_size = all(type(label) is int for label in given)
        return tuple(sorted(set(map(str, given)), key=int if by_size else str))


def read_rows(file: Path) -> TrainingRows:
    """Return the rows of a file of JSON lines.

    Raises:
        PeftfxError: there is no such file, a line is not a JSON object, or the rows are of no known kind or of several.
    """
    if not is_file(file):
        raise PeftfxError("there is no such file", str(file), "give a file of JSON lines")
    items, kinds = [], dict[str, int]()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise PeftfxError(f"cannot be read as text: {error}", str(file), "give a file of JSON lines, UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PeftfxError(f"line {number} is no JSON: {error}", str(file), "one object a line") from error
        kind = _kind(row)
        if kind == _TEXT and "label" in row:
            what = f"line {number} has the label {shown(row['label'])}, which names no class"
            raise PeftfxError(what, str(file), "give a text or a whole number; or leave all labels out")
        if not kind:
            raise PeftfxError(f"line {number} has {_wrong(row)}", str(file), _FORMS)
        kinds.setdefault(kind, number)
        items.append(row)
    if len(kinds) > 1:
        (one, a), (other, b) = list(kinds.items())[:2]
        raise PeftfxError(f"line {a} is of kind {one}, line {b} of kind {other}", str(file), "a file has one kind")
    if not items:
        raise PeftfxError("the file has no rows", str(file), "give a file of JSON lines")
    return TrainingRows(next(iter(kinds)), tuple(items), str(file))


def _kind(row: object) -> str:
    if not isinstance(row, dict):
        return ""
    for kind, keys in _KINDS.items():
        if keys <= row.keys() and all(_is_right(name, row[name]) for name in keys):
            return kind
    return ""


def _wrong(row: object) -> str:
    """Say what is wrong with a row of no kind."""
    if not isinstance(row, dict):
        return shown(row)
    said = row.get("messages")
    if isinstance(said, list) and said and _is_right("messages", [*said, _ANSWER]):
        return f"messages of which the last is not the assistant's, but has the role {shown(said[-1].get('role'))}"
    texts = [
        name for name in ("text", "prompt", "completion", "messages") if name in row and not _is_right(name, row[name])
    ]
    told = [f"{name}, which is no {'chat' if name == 'messages' else 'text'}: {shown(row[name])}" for name in texts]
    return "; ".join(told) or ", ".join(map(str, row))


def _is_right(name: str, value: object) -> bool:
    if name == "messages":
        said = (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
        )
        return bool(said) and value[-1].get("role") == _ANSWER["role"]  # type: ignore[index]
    return isinstance(value, (str, int)) if name == "label" else isinstance(value, str)


def encoded(
    rows: TrainingRows, tokenizer: Any, most: int, classes: Sequence[str] = (), *, sourced: bool = False
) -> list[dict[str, Any]]:
    """Return the rows as tokens and labels; the loss ignores the prompts of completions and chats.

    Args:
        rows: the rows.
        tokenizer: the model's tokenizer.
        most: the most tokens of a row.
        classes: the names of the classes.
        sourced: whether the model is an encoder-decoder: it reads the prompt, and its labels are the completion.

    Raises:
        PeftfxError: a label is unknown, the tokenizer has no chat template, a row that was cut to `most` tokens has
            nothing left to learn, or an encoder-decoder gets rows without prompts.
    """
    if sourced and rows.kind in (_TEXT, CHAT):
        what = f"rows of {rows.kind} do not tell what an encoder-decoder reads, and what it writes"
        raise PeftfxError(what, rows.where, f"give rows of {COMPLETION}: prompt and completion")
    found = []
    for number, row in enumerate(rows.items, 1):
        where = f"{rows.where}, row {number}"
        if rows.kind == CLASSES:
            if str(row["label"]) not in classes:
                raise PeftfxError(f"the label {row['label']!r} is not in the training data", where, ", ".join(classes))
            ids = tokenizer(row["text"], truncation=True, max_length=most)["input_ids"]
            found.append({"input_ids": ids, "labels": list(classes).index(str(row["label"]))})
            continue
        if sourced:
            found.append(_source_and_target(row, tokenizer, most))
            continue
        ids, ahead = _tokens(rows.kind, row, tokenizer, where)
        ids = ids[:most]
        if len(ids) <= max(1, ahead):
            what = f"its first {most} tokens have nothing to learn from"
            raise PeftfxError(what, where, "pass a larger --max-length, if the model takes it; or leave the row out")
        found.append({"input_ids": ids, "labels": [IGNORED] * ahead + ids[ahead:]})
    return found


def _source_and_target(row: _Row, tokenizer: Any, most: int) -> dict[str, Any]:
    """Return the tokens that an encoder-decoder reads, and those that it learns to write, up to the end token."""
    read = tokenizer(row["prompt"], truncation=True, max_length=most)["input_ids"]
    written = list(tokenizer(text_target=row["completion"])["input_ids"])
    return {"input_ids": read, "labels": _ended(written, _end_of(tokenizer))[:most]}


def _end_of(tokenizer: Any) -> list[int]:
    """Return the token that ends a text, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _ended(ids: list[int], end: list[int]) -> list[int]:
    """Return tokens with the end of a text, which some tokenizers write themselves."""
    return ids if end and ids[-1:] == end else ids + end


def _tokens(kind: str, row: _Row, tokenizer: Any, where: str) -> tuple[list[int], int]:
    """Return the tokens of a row, and how many of them come before the tokens to learn."""
    end = _end_of(tokenizer)
    if kind == _TEXT:
        return _ended(list(tokenizer(row["text"])["input_ids"]), end), 0
    if kind == COMPLETION:
        ahead = list(tokenizer(row["prompt"])["input_ids"])
        ahead = ahead[: -len(end)] if end and ahead[-1:] == end else ahead
        return ahead + list(tokenizer(row["completion"], add_special_tokens=False)["input_ids"]) + end, len(ahead)
    messages, hint = row["messages"], "give prompts and completions"
    ahead = filled_template(tokenizer, messages[:-1], where, hint, add_generation_prompt=True, tokenize=False)
    whole = filled_template(tokenizer, messages, where, hint, tokenize=False)
    start = ahead if whole.startswith(ahead) else ""
    first = list(tokenizer(start, add_special_tokens=False)["input_ids"]) if start else []
    rest = list(tokenizer(whole.removeprefix(start), add_special_tokens=False)["input_ids"])
    return first + rest, len(first)


@dataclass(frozen=True)
class Padded:
    """A collator that makes tensors of one length from rows, padded on the right.

    Attributes:
        pad: the id of the padding token.
    """

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = [[*row["input_ids"], *[self.pad] * (length - len(row["input_ids"]))] for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        labels = [row["labels"] for row in rows]
        if isinstance(labels[0], list):
            longest = max(map(len, labels))
            labels = [[*own, *[IGNORED] * (longest - len(own))] for own in labels]
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.tensor(values) for name, values in named.items()}
