"""DoRA's linear layer in training as one operation, with fewer passes over activations, and one stored activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.contract.common.lora.dora import gain, updated_norms


def is_scaled_at_once(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor) -> bool:
    """Return whether `scaled_linear` may run: on plain CPU tensors of one precision, over a frozen base.

    In bfloat16 and float16 an update that is added to the weight would be rounded away.
    """
    read = [weight] if bias is None else [weight, bias]
    traced = isinstance(x, FakeTensor) or torch.compiler.is_compiling()
    plain = all(type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad for tensor in read)
    exact = x.dtype == weight.dtype == a.dtype and x.dtype in (torch.float32, torch.float64)
    on_cpu = x.device.type == weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and exact and on_cpu and not traced


def scaled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float
) -> Tensor:
    """Return `g (W + s B A) x + bias` with `g = m / ||W + s B A||`, in few passes over activations.

    Args:
        x: input, [..., in].
        weight, bias: the base's, [out, in] and [out]; they get no gradients.
        a, b, magnitude: DoRA's parameters A [r, in], B [out, r] and m, of `out` values.
        scaling: `s`.

    For many vectors there is one product with an updated weight, which is computed again for the gradient of `x`. Then
    this weight is no larger than the input and the output together. For few vectors the update is added to the product
    with the base's weight. One activation is kept, for the gradient of m. The output is not kept, because the model's
    code may change it in place.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Scaled.apply(rows, weight, bias, a, b, magnitude, scaling)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], len(b))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.scaling, ctx.updates = scaling, len(x) * sum(weight.shape) >= weight.numel()
        if ctx.updates:
            updated = torch.addmm(weight, b, a, alpha=scaling)
            norms, inner = torch.linalg.vector_norm(updated, dim=1), F.linear(x, updated)
        else:
            norms = updated_norms(weight, a, b, scaling)
            inner = F.linear(x, weight).addmm_((a @ x.T).T, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, magnitude, norms, inner)
        gains = gain(magnitude, norms)
        return inner * gains if bias is None else torch.addcmul(bias, inner, gains)

    @staticmethod
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, magnitude, norms, inner = ctx.saved_tensors
        s, (for_x, _, _, for_a, for_b, for_m, _) = ctx.scaling, ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of gradients is asked for, and what follows has none
            inner = F.linear(x, weight) + s * F.linear(F.linear(x, a), b)
            output = gain(magnitude, norms) * inner
            needed = [t for t, needs in ((x, for_x), (a, for_a), (b, for_b), (magnitude, for_m)) if needs]
            found = iter(torch.autograd.grad(output, needed, back, create_graph=True))
            to_x, to_a, to_b, to_m = (next(found) if needs else None for needs in (for_x, for_a, for_b, for_m))
            return to_x, None, None, to_a, to_b, to_m, None
        gains = gain(magnitude, norms)[:, None]
        to_x = to_a = to_b = to_m = None
        if for_x or for_a:
            through = (s * gains * b).T @ back.T
            to_a = through @ x
        if for_x and ctx.updates:
            to_x = back @ torch.addmm(weight, b, a, alpha=s).mul_(gains)
        elif for_x:
            to_x = ((back * gains.T) @ weight).addmm_(through.T, a)
        if for_b:
            to_b = ((a @ x.T) @ back).T * (s * gains)
        if for_m:
            to_m = ((back * inner).sum(0) / norms).view_as(magnitude)
        return to_x, None, None, to_a, to_b, to_m, None
