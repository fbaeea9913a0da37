"""Ranking: texts by a score, the best first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftfx.serving.runs.asked import Found


def ranked(texts: Sequence[str], scores: Sequence[float], name: str) -> Iterator[Found]:
    """A line for each text: its place among those that were given, its score under this name, and itself."""
    for i in sorted(range(len(texts)), key=lambda i: -scores[i]):
        yield Found({"index": i, name: scores[i], "text": texts[i]})
