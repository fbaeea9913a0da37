"""Chat templates, which are programs of the model's author, filled by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError


def filled_template(writer: Any, said: Sequence[Mapping[str, Any]], where: str, hint: str, **options: object) -> Any:
    """Return what `apply_chat_template` of a tokenizer or processor makes of messages.

    Args:
        writer: the tokenizer or processor.
        said: the messages.
        where: the directory or row, for the error.
        hint: what the user can do without a template.
        options: those of `apply_chat_template`.

    Raises:
        PeftfxError: there is no template, or it has a mistake, or it refuses these messages.
    """
    from jinja2 import TemplateError

    if not getattr(writer, "chat_template", None):
        kind = "processor" if hasattr(writer, "tokenizer") else "tokenizer"
        raise PeftfxError(f"the {kind} has no chat template", where, hint)
    with understanding(where, "the chat template cannot be filled", hint, also=TemplateError):
        return writer.apply_chat_template(said, **options)
