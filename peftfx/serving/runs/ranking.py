"""Rank texts by a score, the best first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftfx.serving.runs.asked import Found


def ranked(texts: Sequence[str], scores: Sequence[float], name: str) -> Iterator[Found]:
    """Yield a result for each text: its index among the given texts, its score under `name`, and the text."""
    for i in sorted(range(len(texts)), key=lambda i: -scores[i]):
        yield Found({"index": i, name: scores[i], "text": texts[i]})
