"""Trainable tokens: some rows of the token embedding are trained, those of new tokens say, and nothing else.

The adapter has those rows alone. Where the model says that its embedding is tied to a head, the head reads them too; a
head that is tied by hand keeps its own. HF PEFT's `TrainableTokensConfig`; beside a LoRA it is that rule's
`trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftfx.contract.override import TOKENS, OverrideMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(OverrideMethod):
    """Trains rows of an embedding, by their indices.

    Args:
        token_indices: the tokens; each once.
        target: the embeddings; by default that of tokens.

    Example:
        >>> adapted = peftfx.transform(model, peftfx.TrainableTokens(token_indices=[62, 63]))
    """

    token_indices: Sequence[int] = ()

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    default_target: ClassVar[str] = "embedding.token"
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding"})
    layered: ClassVar[bool] = False
    ignored: ClassVar[frozenset[str]] = frozenset({"init_weights"})  # of a new adapter; what is loaded has its values

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token_indices:
            raise PeftfxError("no tokens are named", "token_indices", "TrainableTokens(token_indices=[32000, 32001])")

    def copied(self, site: Site, names: Sequence[str]) -> Sequence[str]:
        return [name for name in names if name == "weight"]

    def rows(self) -> tuple[int, ...]:
        return tuple(self.token_indices)

    def suffix(self, name: str) -> str:
        return TOKENS
