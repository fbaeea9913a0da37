"""Trainable tokens: only some rows of the token embedding are trained, such as those of new tokens.

The adapter holds only these rows. If the model says that its embedding is tied to a head, the head reads them too. A
head that is tied only by hand keeps the base's rows. This is HF PEFT's `TrainableTokensConfig`. Together with a LoRA,
use the LoRA's `trainable_token_indices`.
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
    """Trained rows of an embedding, chosen by their indices.

    Args:
        token_indices: the tokens, each only once.
        target: the embeddings; by default the token embedding.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.TrainableTokens(token_indices=[62, 63]))
    """

    token_indices: Sequence[int] = ()

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    default_target: ClassVar[str] = "embedding.token"
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding"})
    layered: ClassVar[bool] = False
    ignored: ClassVar[frozenset[str]] = frozenset({"init_weights"})  # it concerns new adapters only

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
