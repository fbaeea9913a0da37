"""The tokens of texts, as sentence-transformers makes them for a model of sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfx.bases.chats import filled_template
from peftfx.bases.sentences.modules import LENGTHS
from peftfx.errors import PeftfxError
from peftfx.files import is_file, read_json

_HINT = "copy the tokenizer's files, and its chat template, from the model that was trained"
_Said = Mapping[str, str]  #: what each role says
_FILLED = ("0", "1 2 3 4")  #: two contents; what their chats end with is the template's own


@dataclass(frozen=True)
class SentenceTexts:
    """How texts become tokens: the longest text, lower case, a chat template.

    A model whose tokenizer has a chat template, and which sentence-transformers 6 has saved, reads each text as what a
    user says, or a query and a document as what two roles say. A prompt is then the system's message.

    Attributes:
        path: the file that tells it.
        said: what the file says.
        positions: the most tokens by the model's config, where the file tells no length; None if the config tells none.
    """

    path: Path
    said: Mapping[str, Any]
    positions: int | None = None

    @staticmethod
    def read(directory: Path, config: object = None) -> SentenceTexts:
        """Read the file in a directory, and the length in the model's config. Without a file, texts are taken whole."""
        path, most = directory / LENGTHS, getattr(config, "max_position_embeddings", None)
        positions = most if isinstance(most, int) and most > 0 else None
        return SentenceTexts(path, read_json(path) if is_file(path) else {}, positions)

    @property
    def format(self) -> str | None:
        """The form of a message's content, `flat` or `structured`; None if texts are no messages."""
        message = self._table("modality_config").get("message")
        return str(message.get("format", "flat")) if isinstance(message, Mapping) else None

    def tokens(self, tokenizer: Any, texts: Sequence[str], prompt: str, kind: str = "") -> Mapping[str, Tensor]:
        """Return the tokens of texts, each behind the prompt, as rows of one length.

        Args:
            tokenizer: the tokenizer beside the model.
            texts: the texts.
            prompt: the prompt; it may be empty.
            kind: `query` or `document`, for which the file may tell a length of its own.

        Raises:
            PeftfxError: texts are messages, and the tokenizer's chat template cannot be filled.
        """
        return self._tokens(tokenizer, [{"user": text} for text in texts], prompt, kind)

    def pair_tokens(self, tokenizer: Any, query: str, texts: Sequence[str], prompt: str) -> Mapping[str, Tensor]:
        """Return the tokens of a query with each of the texts, as `tokens` does; the prompt is put before the query."""
        return self._tokens(tokenizer, [{"query": query, "document": text} for text in texts], prompt)

    def _tokens(self, tokenizer: Any, said: Sequence[_Said], prompt: str, kind: str = "") -> Mapping[str, Tensor]:
        longest = self.said.get(f"{kind}_length") or self.said.get("max_seq_length") or self._most(tokenizer)
        options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
        options |= {"max_length": longest} if isinstance(longest, int) else {}
        options |= {k: v for k, v in self._table("processing_kwargs", "text").items() if k != "logits_to_keep"}
        if self.said.get("do_lower_case"):
            said, prompt = [{role: text.lower() for role, text in one.items()} for one in said], prompt.lower()
        if self.format is None:
            first, *others = (list(texts) for texts in zip(*(one.values() for one in said), strict=True))
            made: Mapping[str, Tensor] = tokenizer([prompt + text for text in first], *others, **options)
            return made
        made = self._filled(tokenizer, [self._chat(one, prompt) for one in said], **options)
        if self._table("processing_kwargs", "chat_template").get(_RESTORED, True):
            most = options.get("max_length", tokenizer.model_max_length)
            self._restore_ends(tokenizer, list(said[0]), prompt, made, most)
        return made

    def _most(self, tokenizer: Any) -> int | None:
        return None if self.positions is None else min(self.positions, tokenizer.model_max_length)

    def _chat(self, said: _Said, prompt: str) -> list[dict[str, Any]]:
        whole = {**({"system": prompt} if prompt else {}), **said}
        flat = self.format != "structured"
        return [{"role": r, "content": t if flat else [{"type": "text", "text": t}]} for r, t in whole.items()]

    def _filled(self, tokenizer: Any, chats: Sequence[Any], **options: Any) -> Any:
        own = {k: v for k, v in self._table("processing_kwargs", "chat_template").items() if k != _RESTORED}
        options = {**options, **own, "tokenize": True, "return_dict": True}
        return filled_template(tokenizer, chats, str(self.path), _HINT, **options)

    def _restore_ends(
        self, tokenizer: Any, roles: Sequence[str], prompt: str, made: Mapping[str, Tensor], most: int
    ) -> None:
        """Write what the template puts behind a text over the last tokens of the texts that were cut."""
        if made["input_ids"].shape[1] < most:
            return
        filled = [self._chat(dict.fromkeys(roles, text), prompt) for text in _FILLED]
        one, other = self._filled(tokenizer, filled)["input_ids"]
        count = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), 0)
        ids, mask = made["input_ids"], made["attention_mask"]
        for row, length in enumerate(mask.sum(1).tolist()):
            if count and length >= most:
                end = ids.shape[1] if mask[row, 0] == 0 else length
                kept = min(count, length)
                ids[row, end - kept : end] = ids.new_tensor(one[-kept:])

    def _table(self, *names: str) -> Mapping[str, Any]:
        found: Any = self.said
        for name in names:
            found = found.get(name) or {}
            if not isinstance(found, Mapping):
                raise PeftfxError(f"{name} is no table", str(self.path), "copy the file of the model again")
        return found


_RESTORED = "restore_suffix"  #: sentence-transformers' own word among the options of a chat template
