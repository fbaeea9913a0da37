"""Answer a question by the words of texts, with a model that says where an answer starts and ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.fitting import refuse_idle
from peftfx.serving.served import Served

STARTS, ENDS = "start_logits", "end_logits"
_LONGEST = 15  #: the most tokens of an answer
_ENDLESS = 10**6  #: a tokenizer that tells no longest text tells a number above this
_HINT = "pass --verbose to see the cause"


def answered(served: Served, asked: Asked) -> Iterator[Found]:
    """Yield, for each text, the likeliest answers in it to the query.

    A text that is longer than the tokenizer's longest is read in overlapping pieces. The score of an answer is the
    product of the probabilities of its two ends, within a piece.

    Raises:
        PeftfxError: an option would have no effect, the question leaves no room for a text, or the tokenizer does not
            tell where its tokens are in a text.
    """
    refuse_idle(asked, "answers a question", "top")
    assert asked.query is not None
    for text in asked.texts:
        with understanding(text, "the tokenizer does not take this text with the question", _HINT):
            pieces = _pieces(served, asked.query, text)
        given = {name: value for name, value in pieces.items() if name in served.model.inputs}
        made = served(**given)
        found: list[dict[str, Any]] = []
        for row, places in enumerate(pieces["offset_mapping"].tolist()):
            inside = torch.tensor([part == 1 for part in pieces.sequence_ids(row)])
            for score, start, end in _spans(made[STARTS][row].float(), made[ENDS][row].float(), inside):
                first, last = places[start][0], places[end][1]
                found.append({"answer": text[first:last], "score": score, "start": first, "end": last})
        yield Found({"text": text, "answers": _best(found, asked.top or 1)})


def _pieces(served: Served, query: str, text: str) -> Any:
    """Return the tokens of the question with each piece of a text, and their places."""
    tokenizer, cut = served.tokenizer, {}
    if (most := tokenizer.model_max_length) < _ENDLESS:
        asked = len(tokenizer(query, add_special_tokens=False)["input_ids"])
        room = most - asked - tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            what = f"the question has {asked} tokens, and the model takes {most}: none is left for a text"
            raise PeftfxError(what, "--query", "ask a shorter question")
        cut = {"truncation": "only_second", "max_length": most, "stride": room // 4}
    options = {"return_overflowing_tokens": True, "return_offsets_mapping": True, "padding": True}
    return tokenizer(query, text, **options, **cut, return_tensors="pt")


def _spans(starts: Tensor, ends: Tensor, inside: Tensor) -> Iterator[tuple[float, int, int]]:
    """Yield the answers of a piece, with their scores, from each token of the text to one that is not too far."""
    hidden = torch.finfo(starts.dtype).min
    first, last = (logits.masked_fill(~inside, hidden).softmax(-1) for logits in (starts, ends))
    for start in inside.nonzero()[:, 0].tolist():
        for end in range(start, min(start + _LONGEST, len(inside))):
            if inside[end]:
                yield float(first[start] * last[end]), start, end


def _best(found: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the answers with the highest scores, each place once: pieces overlap."""
    places: dict[tuple[int, int], dict[str, Any]] = {}
    for one in sorted(found, key=lambda one: -float(one["score"])):
        places.setdefault((one["start"], one["end"]), one)
    return list(places.values())[:count]
