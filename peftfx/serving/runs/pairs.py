"""Compare a query with texts by a model that takes pairs of texts, such as a re-ranker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from peftfx.bases.sentences.modules import SETTINGS, prompts_of
from peftfx.bases.sentences.texts import SentenceTexts
from peftfx.errors import PeftfxError
from peftfx.files import is_file, read_json
from peftfx.serving.load import load
from peftfx.serving.runs.answers import ENDS, STARTS, answered
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.fitting import refuse_idle
from peftfx.serving.runs.ranking import ranked
from peftfx.serving.served import Served

_BATCH = 32


def run(asked: Asked, out: TextIO | None = None) -> Iterator[Found]:
    """Yield the texts by their scores, the best first, for a model with one label; otherwise the labels of each pair.

    A model that says where an answer starts and ends answers the query by each text.

    Raises:
        PeftfxError: the model gives no logits for a pair of texts, or its directory has no tokenizer.
    """
    served = load(asked.directory, adapter=asked.adapter, providers=asked.providers)
    if {STARTS, ENDS} <= set(served.model.outputs):
        yield from answered(served, asked)
        return
    if "logits" not in served.model.outputs or len(served.model.axes["logits"]) != 2:
        what = "this model neither embeds sentences nor classifies texts: it cannot compare a query with texts"
        raise PeftfxError(what, str(asked.directory), "leave --query out")
    assert asked.query is not None
    several = served.model.axes["logits"][1] != 1
    refuse_idle(asked, "compares texts with a query", *(("top",) if several else ()))
    logits = torch.cat([_logits(served, asked.query, some) for some in _batches(asked.texts)])
    config: Any = served.config
    if logits.shape[1] == 1:
        yield from ranked(asked.texts, activation(config, served.directory)(logits[:, 0]).tolist(), "score")
        return
    labelled = getattr(config, "problem_type", None) == "multi_label_classification"
    shares = logits.sigmoid() if labelled else logits.softmax(-1)
    for text, row in zip(asked.texts, shares, strict=True):
        order = row.argsort(descending=True)[: asked.most_labels].tolist()
        labels = [{"label": config.id2label[i], "score": float(row[i])} for i in order]
        yield Found({"text": text, "labels": labels})


def activation(config: object, directory: Path) -> Callable[[Tensor], Tensor]:
    """Return the function from logits to scores, as sentence-transformers' `CrossEncoder` reads it; default: sigmoid.

    Args:
        config: the model's config, which has its name in models of older versions.
        directory: the directory with sentence-transformers' own settings.

    Raises:
        PeftfxError: the config names an activation that torch does not have.
    """
    own, path = getattr(config, "sentence_transformers", None), directory / SETTINGS
    said = read_json(path) if is_file(path) else {}
    name = said.get("activation_fn") or (own.get("activation_fn") if isinstance(own, dict) else None)
    name = name or getattr(config, "sbert_ce_default_activation_function", None) or "torch.nn.Sigmoid"
    found = getattr(nn, str(name).rpartition(".")[2], None)
    if not str(name).startswith("torch.nn.") or not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise PeftfxError(
            f"the activation of scores is {name}, which torch does not have", str(directory), "name one of torch's"
        )
    return found()


def _logits(served: Served, query: str, texts: Sequence[str]) -> Tensor:
    prompts, default = prompts_of(served.directory)
    ahead = "" if default is None else prompts[default]
    inputs = SentenceTexts.read(served.directory, served.config).pair_tokens(served.tokenizer, query, texts, ahead)
    found: Tensor = served(**{name: value for name, value in inputs.items() if name in served.model.inputs}).logits
    return found.float()


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH))
