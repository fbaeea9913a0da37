"""Prompt tuning: trained embeddings of virtual tokens before the text (Lester et al. 2021, arXiv:2104.08691).

The model, or the encoder of an encoder-decoder, reads `[P; E(ids)]`, with `P` [num_virtual_tokens, token_dim]. As in HF
PEFT, outputs with a value for each token, such as a causal LM's logits, are longer by `num_virtual_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Params
from peftfx.contract.sequence import PROMPT, PromptMethod, with_text_sizes
from peftfx.errors import PeftfxError, first_line
from peftfx.sites.site import SequenceSite


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptMethod):
    """Virtual tokens, each with its own trained embedding.

    Args:
        prompt_tuning_init: RANDOM (normal), SAMPLE_VOCAB (embeddings of random tokens) or TEXT (of a text's tokens).
        prompt_tuning_init_text: the text, repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: the tokenizer that reads the text; a local directory.
        tokenizer_kwargs: arguments for `AutoTokenizer.from_pretrained`.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.PromptTuning(num_virtual_tokens=20))
    """

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, object] | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        how = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        object.__setattr__(self, "prompt_tuning_init", how)
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path") if how == "TEXT" else ():
            if not getattr(self, name):
                raise PeftfxError(f"prompt_tuning_init='TEXT' needs {name}", name, "give it, or start at 'RANDOM'")

    def sized(self, base: nn.Module, site: SequenceSite) -> PromptTuning:
        return with_text_sizes(self, base, site)

    def init(self, site: SequenceSite, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        weight = embed.weight
        assert isinstance(weight, Tensor)
        kind = adapter_dtype(weight.dtype)
        if self.prompt_tuning_init == "RANDOM":
            return {PROMPT: torch.empty(self.saved_shape(), dtype=kind, device=weight.device).normal_(generator=rng)}
        ids = self._text_ids(site) if self.prompt_tuning_init == "TEXT" else self._random_ids(site, weight, rng)
        return {PROMPT: embed(ids.to(weight.device)).detach().clone().to(kind)}

    def _random_ids(self, site: SequenceSite, weight: Tensor, rng: torch.Generator | None) -> Tensor:
        return torch.randint(site.shape[0], self.saved_shape()[:1], generator=rng, device=weight.device)

    def _text_ids(self, site: SequenceSite) -> Tensor:
        """Return the text's tokens, repeated or cut to the number of virtual tokens."""
        from transformers import AutoTokenizer

        options = {k: v for k, v in (self.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
        name, count = str(self.tokenizer_name_or_path), self.saved_shape()[0]
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise PeftfxError(
                f"cannot load the tokenizer: {first_line(error)}", name, "give a directory that holds one"
            ) from error
        ids = list(tokenizer(self.prompt_tuning_init_text)["input_ids"])
        if not ids or max(ids) >= site.shape[0]:
            what = "the text has no tokens" if not ids else f"token {max(ids)} is not in the model's vocabulary"
            raise PeftfxError(what, "prompt_tuning_init_text", "give a text, and the model's own tokenizer")
        return torch.tensor((ids * -(-count // len(ids)))[:count])

    def saved(self, p: Params, training: bool = False) -> Tensor:
        return p[PROMPT]
