"""The views of a model by their names: forward, decode, encoder, decoder."""

from __future__ import annotations

from torch import nn

from peftfx.errors import PeftfxError, nearest
from peftfx.views.decode import decode_view
from peftfx.views.encoder_decoder import Decoder, Encoder
from peftfx.views.finding.encoder_decoder_layers import find_layers
from peftfx.views.view import View


def find_view(base: nn.Module, name: str) -> View | None:
    """The view of this name of a model; `None` for its forward.

    Raises:
        PeftfxError: the name is unknown, or the model has no such view.
    """
    if name == "forward":
        return None
    if name == "decode":
        return decode_view(base)
    if name in ("encoder", "decoder"):
        layers = find_layers(base)
        return Encoder(layers) if name == "encoder" else Decoder(layers)
    known = ("forward", "decode", "encoder", "decoder")
    raise PeftfxError(f"there is no view {name!r}", "view", nearest(name, known) or f"one of {', '.join(known)}")
