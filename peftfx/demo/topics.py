"""Sentences of Python's language reference with their topics: real text that every Python installation has.

`help("import")` prints `pydoc_data.topics`. It is plain text made from reStructuredText. Code, grammar, tables and
headings are recognised by their marks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

#: The demo's classes, and their topics in `pydoc_data.topics`. No topic contains another one, unlike "specialnames" and
#: "compound". Each has at least 50 sentences in Python 3.11 to 3.13.
TOPICS: Mapping[str, str] = {
    "debugger": "debugger",
    "string formatting": "formatstrings",
    "string methods": "string-methods",
    "attribute access": "attribute-access",
    "dictionaries": "typesmapping",
    "comparisons": "comparisons",
    "imports": "import",
    "names and scopes": "execmodel",
}

_NOT_PROSE = re.compile(r"::=|>>>|[*=~^-]{4}|\+[-=]{3}|\|")
_LABEL = re.compile(r"^(\* |\d+\. |Note: |See also: |((New|Added|Changed) in|Deprecated since) version [\d.]+: )+")
_MARKUP = re.compile(r"\[\d+\]|[*\"“”`]")
_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z(])")


@dataclass(frozen=True)
class Example:
    """A sentence and the index of its topic in `TOPICS`."""

    text: str
    label: int


@dataclass(frozen=True)
class Split:
    """Training examples and held-out examples. No sentence is in both."""

    train: list[Example]
    held_out: list[Example]


def load_split(seed: int = 0, *, per_topic: int = 100, held_out: float = 0.25) -> Split:
    """Make a random split by sentence, with the same share of each topic held out.

    Args:
        seed: the seed of the split.
        per_topic: the most sentences to take of one topic, so that none dominates.
        held_out: the share of each topic's sentences that is held out.
    """
    from pydoc_data.topics import topics

    found: dict[str, dict[int, str]] = {}  # a sentence in two topics is left out
    for label, name in enumerate(TOPICS.values()):
        for text in sentences(topics.get(name, "")):
            found.setdefault(text.lower(), {})[label] = text
    examples = [Example(text, label) for owners in found.values() if len(owners) == 1 for label, text in owners.items()]
    rng = random.Random(seed)
    rng.shuffle(examples)
    split = Split([], [])
    for label in range(len(TOPICS)):
        own = [e for e in examples if e.label == label][:per_topic]
        count = round(len(own) * held_out)
        split.held_out.extend(own[:count])
        split.train.extend(own[count:])
    return split


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a topic's prose, without markup. Short, long or code-like sentences are left out."""
    for block in re.split(r"\n\s*\n", text):
        if _NOT_PROSE.search(block):
            continue
        line = _MARKUP.sub("", _LABEL.sub("", " ".join(block.split())))
        for sentence in _END.split(line):
            plain = " ".join(sentence.split())
            if 6 <= len(plain.split()) <= 60 and _is_prose(plain):
                yield plain


def _is_prose(sentence: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return sentence[0].isalpha() and sentence[-1] in ".:!?" and letters > 0.85 * len(sentence)


def batches(examples: list[Example], size: int, rng: random.Random | None = None) -> list[list[Example]]:
    """Make batches of examples of similar length, to save padding; in a random order if `rng` is given."""
    shuffled = list(examples) if rng is None else rng.sample(examples, len(examples))
    shuffled.sort(key=lambda e: len(e.text))
    found = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    if rng is not None:
        rng.shuffle(found)
    return found
