"""Embed texts into a file or as JSON, or rank texts by their similarity to a query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

import numpy as np

from peftfx.errors import PeftfxError
from peftfx.files import write_file, writing
from peftfx.serving.load import load
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.fitting import refuse_idle
from peftfx.serving.runs.ranking import ranked
from peftfx.serving.sentences import ServedSentences


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Yield an embedding for each text; with a query, the texts by their similarity to it, the most similar first.

    Raises:
        PeftfxError: the model embeds no sentences, or its directory lacks a tokenizer or the asked prompt.
    """
    served = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    if not isinstance(served, ServedSentences):
        what = "this model embeds no sentences"
        raise PeftfxError(what, str(asked.directory), "export a base that has sentence-transformers' modules.json")
    refuse_idle(asked, "embeds texts")
    if asked.query is not None:
        query = served.encode_query([asked.query])
        scores = served.similarity(query, served.encode_document(asked.texts))[0]
        yield from ranked(asked.texts, scores.tolist(), served.measure)
        return
    found = served.encode(asked.texts, prompt=asked.prompt_name)
    if asked.save is None:
        for text, row in zip(asked.texts, found.tolist(), strict=True):
            yield Found({"text": text, "embedding": row})
        return
    with writing(asked.save):
        write_file(asked.save, lambda path: _write(path, found.numpy()))
    shape = list(found.shape)
    yield Found({"saved": str(asked.save), "shape": shape}, f"{shape[0]} embeddings of {shape[1]} in {asked.save}")


def _write(path: object, rows: np.ndarray) -> None:
    with open(str(path), "wb") as file:  # an open file, because numpy would add an ending to a name
        np.save(file, rows)
