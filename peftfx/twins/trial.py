"""Trials of quantised layers: a layer is run once, to see that it computes what its codes say, and has a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peftfx.errors import PeftfxError, first_line
from peftfx.quantisation.codes import Codes

_PLAIN = (bool, int, float, str, torch.dtype)
_FAR = 0.1  #: how far a layer's output may be from its codes', as a share of the largest: int8 differs by 0.04


def try_layer(path: str, own: nn.Module, layer: nn.Linear, codes: Codes, dtype: torch.dtype) -> str:
    """Return why nothing can be trained through a layer, found by running it; empty if training works.

    Args:
        path: the layer's path, for the message.
        own: the quantised layer; it is left as it was.
        layer: the layer over its codes.
        codes: the codes.
        dtype: the dtype of what flows into the layer.

    Raises:
        PeftfxError: the layer does not compute what its codes say.
    """
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.in_features, generator=rng).to(device_of(own), dtype).requires_grad_()
    try:
        with _unchanged(own), torch.enable_grad():
            own.training = True  # in eval mode bitsandbytes may pack its codes differently
            y = own(x)
            trained = y.requires_grad and torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is not None
    except Exception as error:
        return f"a {type(own).__name__}, which does not run here: {first_line(error)}"
    want = layer(x.detach())
    far = float((y.detach() - want).abs().max() / want.abs().max().clamp(min=1e-12))
    if not far < _FAR:
        kind = f"{type(own).__name__} of {list(codes.shape)}"
        what = f"this {kind} does not compute what its codes, read as {codes.format}, say: {far:.1%} off"
        hint = (
            "its package may be broken on this device, or for this size: leave such layers as they are when you "
            "quantise (bitsandbytes: llm_int8_skip_modules), or use the unquantised model"
        )
        raise PeftfxError(what, path, hint)
    return "" if trained else f"a {type(own).__name__} whose own product has no gradient"


@contextmanager
def _unchanged(own: nn.Module) -> Iterator[None]:
    """Let a layer be run without a trace: bitsandbytes takes the dtype of its first input to compute in, for good."""
    values = {name: value for name, value in vars(own).items() if value is None or isinstance(value, _PLAIN)}
    tensors = [(p, p.data) for p in own._parameters.values() if p is not None]
    try:
        yield
    finally:
        vars(own).update(values)
        for p, data in tensors:
            if p.dtype != data.dtype:  # a bias is cast
                p.data = data


def device_of(own: nn.Module) -> torch.device:
    """Return the device of the tensors of the module `own`, without those of modules inside."""
    return next(t.device for t in own_tensors(own))


def own_tensors(own: nn.Module) -> list[Tensor]:
    """Return the tensors of the module `own`, without those of modules inside."""
    return [t for t in (*own._parameters.values(), *own._buffers.values()) if t is not None]
