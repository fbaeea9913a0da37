"""A model that embeds sentences in ONNX Runtime: texts in, vectors out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfx.bases.sentences.modules import SETTINGS, prompts_of
from peftfx.bases.sentences.steps import SENTENCE
from peftfx.bases.sentences.texts import SentenceTexts
from peftfx.errors import PeftfxError, nearest
from peftfx.files import is_file, read_json
from peftfx.serving.served import ServedForward

_BATCH = 32
_QUERIES, _DOCUMENTS = ("query",), ("document", "passage", "corpus")


class ServedSentences(ServedForward):
    """A model with `sentence_embedding` among its outputs.

    The prompts, the longest text and the measure of similarity come from sentence-transformers' files in the directory.
    """

    def encode(self, texts: str | Sequence[str], *, prompt: str | None = None, batch_size: int = _BATCH) -> Tensor:
        """Compute the embeddings of texts: float32 [texts, width]. That of one text, given by itself, is [width].

        Where the settings beside the model tell a `truncate_dim`, embeddings have this width.

        Args:
            texts: the texts. Each is cut to the model's longest text.
            prompt: the name of the prompt that is put before each text; by default the directory's default prompt, if
                any.
            batch_size: the number of texts in each call of the model.

        Raises:
            PeftfxError: the prompt is unknown, or there is no tokenizer.
        """
        return self._encoded(texts, prompt, batch_size)

    def _encoded(
        self, texts: str | Sequence[str], prompt: str | None, batch_size: int = _BATCH, kind: str = ""
    ) -> Tensor:
        if isinstance(texts, str):
            return self._encoded([texts], prompt, batch_size, kind)[0]
        prompts, default = prompts_of(self.directory)
        name = default if prompt is None else prompt
        if name is not None and name not in prompts:
            hint = nearest(name, prompts) or f"prompts here: {', '.join(prompts) or 'none'}"
            raise PeftfxError(f"there is no prompt named {name!r}", str(self.directory / SETTINGS), hint)
        ahead = "" if name is None else prompts[name]
        how = SentenceTexts.read(self.directory, self.config)
        tokens = (how.tokens(self.tokenizer, some, ahead, kind) for some in _batches(texts, batch_size))
        found = [self._embed(inputs) for inputs in tokens]
        made = torch.cat(found) if found else torch.empty(0, int(self.model.axes[SENTENCE][-1]))
        return made[:, : self._settings.get("truncate_dim")]

    def encode_query(self, texts: str | Sequence[str], **options: int) -> Tensor:
        """Compute the embeddings of queries `texts`, with the prompt for queries, if there is one."""
        return self._encoded(texts, self._prompt_of(_QUERIES), kind="query", **options)

    def encode_document(self, texts: str | Sequence[str], **options: int) -> Tensor:
        """Compute the embeddings of documents `texts`, with the prompt for documents, if there is one."""
        return self._encoded(texts, self._prompt_of(_DOCUMENTS), kind="document", **options)

    def similarity(self, some: Tensor, others: Tensor) -> Tensor:
        """Compute the similarity [some, others] of each pair of embeddings, for example by their cosine."""
        return _MEASURES[self.measure](torch.atleast_2d(some), torch.atleast_2d(others))

    @property
    def measure(self) -> str:
        """The measure of similarity: cosine, dot, euclidean or manhattan. Distances are negative."""
        named = str(self._settings.get("similarity_fn_name") or "cosine")
        if named not in _MEASURES:
            where = str(self.directory / SETTINGS)
            raise PeftfxError(f"unknown similarity: {named}", where, f"the measures are {', '.join(_MEASURES)}")
        return named

    @property
    def _settings(self) -> Mapping[str, Any]:
        path = self.directory / SETTINGS
        return read_json(path) if is_file(path) else {}

    def _prompt_of(self, names: Sequence[str]) -> str | None:
        prompts, _ = prompts_of(self.directory)
        return next((name for name in names if name in prompts), None)

    def _embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self(**{k: v for k, v in inputs.items() if k in self.model.inputs})[SENTENCE]
        return output.float()


def _batches(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    yield from (texts[start : start + size] for start in range(0, len(texts), size))


def _cosine(some: Tensor, others: Tensor) -> Tensor:
    norm = torch.nn.functional.normalize
    return norm(some, dim=-1) @ norm(others, dim=-1).T


_MEASURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "dot": lambda some, others: some @ others.T,
    "euclidean": lambda some, others: -torch.cdist(some, others),
    "manhattan": lambda some, others: -torch.cdist(some, others, p=1),
}
