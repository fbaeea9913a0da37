"""LLaMA-Adapter: gated prompts to which the last attentions attend (Zhang et al. 2023, arXiv:2303.16199).

`q` is the attention's query after its rotation. `P` is the prompt, [adapter_len, width], which the attention's own
projections map to keys and values. The attention's output is

    attention(q, ...) + gate * softmax(scale * q key(P)^T) value(P)

without a mask and without a rotation of `key(P)`. The softmax is in fp32, and `scale` is the attention's own. The sum
goes through the output projection. HF PEFT's GPT-2 differs: there the second term is added to the output of the
attention's module. peftfx recognises this case by a weight [in, out] that holds query, key and value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfx.contract.attention import AttentionMethod, attend_beside
from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Params
from peftfx.errors import PeftfxError
from peftfx.sites.site import HeadedSite

PROMPT, GATE = "adaption_prompt", "adaption_gate"


@dataclass(frozen=True, kw_only=True)
class LlamaAdapter(AttentionMethod):
    """A prompt for each of the last attentions, with a gate that starts at 0. HF PEFT calls it an adaption prompt.

    Args:
        adapter_len: the number of tokens of a prompt.
        adapter_layers: the number of attentions, counted back from the last targeted attention; by default all.
        target_modules: the end of the path of the modules that compute attention, such as `self_attn`; by default every
            self-attention.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.LlamaAdapter(adapter_len=10, adapter_layers=1))
    """

    adapter_len: int = 10
    adapter_layers: int | None = None

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("adapter_len", self.adapter_len), ("adapter_layers", self.adapter_layers)):
            if least is not None and least < 1:
                raise PeftfxError(f"{name} must be 1 or more, not {least}", name, "LlamaAdapter(adapter_len=10)")

    def among(self, sites: Sequence[HeadedSite]) -> Sequence[HeadedSite]:
        count = len(sites) if self.adapter_layers is None else self.adapter_layers
        if count > len(sites):
            what = f"adapter_layers is {count}, and the target has {len(sites)} attentions"
            raise PeftfxError(what, "adapter_layers", "leave it out to adapt all of them")
        return sites[len(sites) - count :]

    def init(self, site: HeadedSite, weight: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
        like = torch.empty(
            1, self.adapter_len, site.heads.width, dtype=adapter_dtype(weight.dtype), device=weight.device
        )
        return {PROMPT: like.normal_(generator=rng), GATE: like.new_zeros(1)}

    def reads(self, p: Params) -> Tensor:
        return p[PROMPT]

    def is_behind(self, site: HeadedSite) -> bool:
        return site.heads.packed

    def attend(
        self, site: HeadedSite, query: Tensor, output: Tensor, key: Tensor, value: Tensor, p: Params, training: bool
    ) -> Tensor:
        keys, values = self.beside(site, key, value, p)
        return (output + attend_beside(site, query, keys, values)).to(output.dtype)

    def beside(self, site: HeadedSite, key: Tensor, value: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        # Here the scale and the gate cost least, and nothing in an export.
        return key * site.heads.scale, value * p[GATE]

    def keys(self, site: HeadedSite) -> dict[str, str]:
        return {PROMPT: PROMPT, GATE: GATE}

    def naming(self, paths: Sequence[str], modules: Sequence[str]) -> LlamaAdapter:
        """Return a rule that names the last `adapter_layers` of the modules whose paths end with one name.

        If no such name exists, the rule has the paths themselves, which HF PEFT refuses.
        """
        parts = paths[0].split(".")
        names = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
        endings = {name: [module for module in modules if module.endswith(f".{name}")] for name in names}
        name = next((n for n, ending in endings.items() if set(ending[-len(paths) :]) == set(paths)), None)
        filters: dict[str, Any] = dict.fromkeys(("target", "exclude_modules", "layers_to_transform", "layers_pattern"))
        return dataclasses.replace(self, target_modules=name or tuple(paths), adapter_layers=len(paths), **filters)
