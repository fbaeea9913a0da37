"""CPT: a prompt of examples, with embeddings trained near those of the examples' tokens (arXiv:2410.17222).

The prompt is `P = E(cpt_token_ids) + delta`. Each row of `delta` is projected onto a ball, whose radius depends on the
token's type in `cpt_tokens_type_mask`. Modulo 4, types 1 and 3 are templates, 2 is an input, and 0 is a label, whose
row is not trained. CPT's loss includes the labels of the prompt. So a call takes no labels, and `CPT.loss` computes the
loss from its logits.

`delta` is projected when it is read. HF PEFT overwrites `delta` instead, so that the optimiser's next step starts
there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfx.contract.method import Params
from peftfx.contract.sequence import PROMPT, PromptMethod, virtual_tokens, with_text_sizes
from peftfx.errors import PeftfxError
from peftfx.field_types import refuse_misfit_fields
from peftfx.sites.site import SequenceSite
from peftfx.views.entry import Entry, VirtualTokens

TOKENS, DELTA, RADII, TRAINED = "embedding", "delta_embedding", "radii", "trained_rows"


@dataclass(frozen=True)
class _Unlabelled(VirtualTokens):
    """Virtual tokens for which the model's own loss is refused."""

    def check(self, inputs: Mapping[str, object]) -> None:
        if inputs.get("labels") is not None:
            what = "CPT's loss includes the labels of its prompt, and the model's own loss does not"
            raise PeftfxError(what, "labels", "leave them out, and take method.loss(output.logits, labels)")
        super().check(inputs)


@dataclass(frozen=True, kw_only=True)
class CPT(PromptMethod):
    """Context-aware prompt tuning, for causal language models.

    Args:
        cpt_token_ids: the tokens of the prompt, one for each virtual token.
        cpt_mask: 1 for each token that is no padding. As in HF PEFT, the option is read and kept, but not used.
        cpt_tokens_type_mask: the type of each token; by default 1.
        opt_weighted_loss_type: `decay` gives the labels of earlier examples less weight.
        opt_loss_decay_factor: the factor of the weight from each example to the example before.
        opt_projection_epsilon, opt_projection_format_epsilon: the radii for inputs and for templates, at 2048 features.
        tokenizer_name_or_path: not used; kept for HF PEFT's files.

    Examples:
        >>> prompt = [5, 6, 7, 8]  # by the tokenizer: an example's input and its label
        >>> adapted = peftfx.transform(model, peftfx.CPT(cpt_token_ids=prompt, cpt_tokens_type_mask=[1, 2, 3, 4]))
    """

    num_virtual_tokens: int = 0
    cpt_token_ids: Sequence[int] = (0,)
    cpt_mask: Sequence[int] | None = None
    cpt_tokens_type_mask: Sequence[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    peft_type: ClassVar[str] = "CPT"

    def __post_init__(self) -> None:
        refuse_misfit_fields(self)
        count = len(self.cpt_token_ids)
        if self.num_virtual_tokens not in (0, count):
            what = f"{self.num_virtual_tokens} virtual tokens, but the prompt has {count} tokens"
            raise PeftfxError(what, "num_virtual_tokens", "leave it out")
        object.__setattr__(self, "num_virtual_tokens", count)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(given) if given is not None else (1,) * count)
            if len(getattr(self, name)) != count:
                raise PeftfxError(
                    f"the prompt has {count} tokens, not {len(given)}", name, "give one value for each token"
                )
        super().__post_init__()

    def sized(self, base: nn.Module, site: SequenceSite) -> CPT:
        wrong = next((token for token in self.cpt_token_ids if not 0 <= token < site.shape[0]), None)
        if wrong is not None:
            what = f"token {wrong} is not among the model's {site.shape[0]} tokens"
            raise PeftfxError(what, "cpt_token_ids", "take the ids of the model's own tokenizer")
        return dataclasses.replace(with_text_sizes(self, base, site), num_transformer_submodules=1)

    def frozen(self) -> frozenset[str]:
        return frozenset({TOKENS, RADII, TRAINED})

    def init(self, site: SequenceSite, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        weight = embed.weight
        assert isinstance(weight, Tensor)
        rows = embed(torch.tensor(self.cpt_token_ids, device=weight.device)).detach().clone().float()
        return self.split(rows)

    def saved(self, p: Params, training: bool = False) -> Tensor:
        if PROMPT in p:
            return p[PROMPT]
        delta, radii = p[DELTA], p[RADII]
        norms = delta.detach().norm(dim=1, keepdim=True)
        inside = delta.detach() * torch.where(norms > 0, radii / norms.maximum(radii), 1)
        return p[TOKENS] + inside + p[TRAINED] * (delta - delta.detach())

    @property
    def _types(self) -> Sequence[int]:
        return self.cpt_tokens_type_mask or ()

    def _radius(self, kind: int) -> float:
        own = {0: 1e-10, 2: self.opt_projection_epsilon}.get(kind, self.opt_projection_format_epsilon)
        return own if kind == 0 else own * math.sqrt((self.token_dim or 0) / 2048)

    def split(self, saved: Tensor) -> dict[str, Tensor]:
        types = [kind % 4 if kind > 0 else 0 for kind in self._types]
        return {
            TOKENS: saved.clone(),
            DELTA: torch.zeros_like(saved),
            RADII: saved.new_tensor([[self._radius(kind)] for kind in types]),
            TRAINED: saved.new_tensor([[float(kind != 0)] for kind in types]),
        }

    def entry(self, base: nn.Module, site: SequenceSite) -> Entry:
        plain = virtual_tokens(self.num_virtual_tokens, base, site)
        return _Unlabelled(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})

    def loss(self, logits: Tensor, labels: Tensor, input_type_mask: Tensor | None = None) -> Tensor:
        """Return HF PEFT's loss for a call's logits, [batch, prompt and text, words].

        Args:
            logits: the logits of the prompt and the text.
            labels: [batch, text]; -100 for a token without a label.
            input_type_mask: the type of each token of the text; by default all are labels.
        """
        count, device = len(labels), labels.device
        types = torch.full_like(labels, 4) if input_type_mask is None else input_type_mask.to(device)
        prompt, own = (torch.tensor(t, device=device).expand(count, -1) for t in (self.cpt_token_ids, self._types))
        types = torch.cat([own, torch.where(types > 0, types + own.max(), types)], 1)[:, 1:]
        wanted = torch.cat([prompt, labels], 1)[:, 1:].masked_fill(~((types > 0) & (types % 4 == 0)), -100)
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="none", ignore_index=-100)
        if self.opt_weighted_loss_type == "decay":
            each = each * torch.stack([self._decays(row) for row in types])
        return each[wanted != -100].mean()

    def _decays(self, types: Tensor) -> Tensor:
        """Return the weight of each label of a row: 1 for the last example, and less for each example before it."""
        weights, weight = torch.ones(types.shape, device=types.device), 1.0
        for kind in types[(types > 0) & (types % 4 == 0)].unique().flip(0):
            weights[types == kind] = weight
            weight *= self.opt_loss_decay_factor
        return weights
