"""P-tuning: virtual tokens computed by a small network (Liu et al. 2021, arXiv:2103.10385).

This is prompt tuning with `P = encoder(E)`: three linear layers with ReLU, or a bidirectional LSTM and two linear
layers. The network is used only in training. Files hold `P`, and merging computes `P` once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.prompt_networks import EMBEDDING, embedding, layer, lstm, perceptron, run_lstm
from peftfx.contract.method import Params
from peftfx.contract.sequence import PROMPT, PromptMethod, with_text_sizes
from peftfx.errors import PeftfxError
from peftfx.sites.site import SequenceSite

_MLP, _LSTM = ("mlp_head_0", "mlp_head_2", "mlp_head_4"), "lstm_head"


@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod):
    """Virtual tokens that an encoder computes.

    Args:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: the width of the encoder; by default `token_dim`.
        encoder_num_layers: the number of layers of the LSTM; an MLP always has three.
        encoder_dropout: dropout between the LSTM's layers.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.PTuning(num_virtual_tokens=20, encoder_hidden_size=128))
    """

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    peft_type: ClassVar[str] = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        how = getattr(self.encoder_reparameterization_type, "value", self.encoder_reparameterization_type)
        object.__setattr__(self, "encoder_reparameterization_type", how)
        if self.encoder_num_layers < 1 or (self.encoder_hidden_size or 1) < 1 or not 0 <= self.encoder_dropout < 1:
            hint = "PTuning(encoder_hidden_size=128, encoder_num_layers=2, encoder_dropout=0.1)"
            raise PeftfxError("an encoder of this size cannot be made", "encoder_hidden_size", hint)

    def sized(self, base: nn.Module, site: SequenceSite) -> PTuning:
        sized = with_text_sizes(self, base, site)
        return dataclasses.replace(sized, encoder_hidden_size=sized.encoder_hidden_size or sized.token_dim)

    def init(self, site: SequenceSite, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        weight = embed.weight
        assert isinstance(weight, Tensor)
        assert self.token_dim is not None
        assert self.encoder_hidden_size is not None
        width, hidden = self.token_dim, self.encoder_hidden_size
        like = torch.empty(self.saved_shape(), dtype=adapter_dtype(weight.dtype), device=weight.device)
        p = embedding(like, rng)
        if self.encoder_reparameterization_type == "MLP":
            widths: tuple[int, ...] = (width, hidden, hidden, width)
        else:
            p |= lstm(_LSTM, width, hidden, self.encoder_num_layers, like, rng)
            widths = (2 * hidden, 2 * hidden, width)
        for name, inner, outer in zip(_MLP, widths, widths[1:], strict=False):
            p |= layer(name, inner, outer, like, rng)
        return p

    def saved(self, p: Params, training: bool = False) -> Tensor:
        if PROMPT in p:
            return p[PROMPT]
        if self.encoder_reparameterization_type == "MLP":
            return perceptron(_MLP, p, p[EMBEDDING], torch.relu)
        x = run_lstm(_LSTM, self.encoder_num_layers, p, p[EMBEDDING], self.encoder_dropout, training)
        return perceptron(_MLP[:2], p, x, torch.relu)
