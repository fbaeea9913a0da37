"""The modules that a model of transformers embeds its tokens with, at its input and at its output."""

from __future__ import annotations

from torch import nn

from peftfx.bases.guests import own_modules


def input_embeddings(base: nn.Module) -> nn.Module | None:
    """Return the module that transformers calls the model's input embeddings, or None."""
    return _said(base, "get_input_embeddings")


def output_embeddings(base: nn.Module) -> nn.Module | None:
    """Return the module that transformers calls the model's output embeddings, or None."""
    return _said(base, "get_output_embeddings")


def embedding_path(base: nn.Module) -> str | None:
    """Return the path of the module that embeds the model's text, or None if the model does not say."""
    wanted = input_embeddings(base)
    return None if wanted is None else next((path for path, m in own_modules(base) if m is wanted), None)


def _said(base: nn.Module, accessor: str) -> nn.Module | None:
    """Return what the model's accessor gives. transformers' own raises where a model has no such module."""
    try:
        found = getattr(base, accessor)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
