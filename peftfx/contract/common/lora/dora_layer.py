"""DoRA's linear layer in training as one operation, with fewer passes over activations, and one stored activation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from peftfx.contract.common.lora.dora import fits_cache, gain, updated_norms
from peftfx.contract.common.lora.products import chained_product, fast_product

#: From this many values on the output is kept, because a second tensor of its size costs more than to watch it.
_LARGE = 2**16
#: From this many values on one kernel that multiplies and sums costs less than two, which write the products.
_MANY = 2**17
#: The updated weight is kept for the gradient of `x` where input and output together have this many times its values.
_MUCH = 4
#: Magnitudes below it are not divided by.
_LEAST = 1e-12


def is_scaled_at_once(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor) -> bool:
    """Return whether `scaled_linear` may run: on plain CPU tensors of one precision, over a frozen base.

    In bfloat16 and float16 an update that is added to the weight would be rounded away. Under `torch.func`'s transforms
    and in forward mode the layer is written out, because they look into each operation.
    """
    exact = x.dtype == weight.dtype == a.dtype and x.dtype in (torch.float32, torch.float64)
    if not exact or not _is_plain(weight) or not (bias is None or _is_plain(bias)) or isinstance(x, FakeTensor):
        return False
    on_cpu = x.is_cpu and weight.is_cpu and not torch.is_autocast_enabled("cpu")
    return on_cpu and not torch.compiler.is_compiling() and not _is_transformed()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad


def _is_transformed() -> bool:
    transforms: bool = torch._C._are_functorch_transforms_active()
    return transforms or forward_ad._current_level >= 0


def scaled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float
) -> Tensor:
    """Return `g (W + s B A) x + bias` with `g = m / ||W + s B A||`, in few passes over activations.

    Args:
        x: input, [..., in].
        weight, bias: the base's, [out, in] and [out]; they get no gradients.
        a, b, magnitude: DoRA's parameters A [r, in], B [out, r] and m, of `out` values.
        scaling: `s`.

    For many vectors there is one product with an updated weight, which is no larger than the input and the output
    together, or fits into a CPU's cache. It is computed again for the gradient of `x`, or kept where it is small beside
    them. For few vectors the update is added to the product with the base's weight. One activation is kept, for the
    gradient of m: of large outputs the output itself, which most models keep anyway. If the model's code has changed it
    in place, the product is computed again; changes through `.data` are not seen, as by torch's own operations that
    keep their output. With a bias, or where a value of m is about zero, `(W + s B A) x` is kept instead.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Scaled.apply(rows, weight, bias, a, b, magnitude, scaling)
    return y.view(*x.shape[:-1], b.shape[0])


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
        ctx.scaling, ctx.output = scaling, None
        rows, (outputs, inputs) = x.shape[0], weight.shape  # Python's `len` of a tensor takes ten times as long
        values, size = rows * (inputs + outputs), inputs * outputs  # of input and output together, and of the weight
        # The norms need an updated weight. The gradient of `x` needs it scaled too, which is another pass over it.
        updates = 4 * values >= size if fits_cache(weight) else values >= size
        ctx.updates = 2 * values >= 3 * size
        updated = torch.addmm(weight, b, a, alpha=scaling) if updates else None
        norms = updated_norms(weight, a, b, scaling) if updated is None else torch.linalg.vector_norm(updated, dim=1)
        gains = gain(magnitude, norms)
        watched = bias is None and not torch.is_inference_mode_enabled()  # there, no tensor counts its changes
        of_output = watched and rows * outputs >= _LARGE and _least(magnitude) > _LEAST
        if updated is None:
            kept = fast_product(x, weight.T).addmm_((a @ x.T).T, b.T, alpha=scaling)
            y = kept.mul_(gains) if of_output else kept * gains
        else:
            kept = fast_product(x, (updated.mul_(gains[:, None]) if of_output else updated).T)
            y = kept if of_output else kept * gains
        if of_output:
            ctx.output, kept = _Watch(y), y.data  # `y` itself would be refused after a change in place
        stays = of_output and ctx.updates and ctx.needs_input_grad[0] and values >= _MUCH * size
        ctx.save_for_backward(x, weight, a, b, magnitude, norms, gains, kept, updated if stays else None)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, magnitude, norms, gains, kept, updated = ctx.saved_tensors
        s, (for_x, _, _, for_a, for_b, for_m, _) = ctx.scaling, ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of gradients is asked for, and what follows has none
            output = gain(magnitude, norms) * _product(x, weight, a, b, s)
            needed = [t for t, needs in ((x, for_x), (a, for_a), (b, for_b), (magnitude, for_m)) if needs]
            found = iter(torch.autograd.grad(output, needed, back, create_graph=True))
            to_x, to_a, to_b, to_m = (next(found) if needs else None for needs in (for_x, for_a, for_b, for_m))
            return to_x, None, None, to_a, to_b, to_m, None
        to_x = to_a = to_b = to_m = None
        scales: Any
        if ctx.updates:  # the rows' gains scale B where there are many vectors, and the gradient where there are few
            scales, scaled_back = (gains if s == 1 else s * gains)[:, None], back
            scaled = scales * b
        else:
            scales, scaled_back = s, back * gains
            scaled = b if s == 1 else s * b
        # What reads the gradient and `x` comes first, while a CPU's cache has them. A product whose result is
        # [r, vectors] takes a third of the time of one whose result is [vectors, r], because its rows are long.
        if ctx.updates:
            to_a = chained_product(scaled.T, back.T, x) if for_a else None
        elif for_x or for_a:
            through = fast_product(scaled.T, scaled_back.T)
            to_a = fast_product(through, x)
        if for_b:  # in B's own layout, or autograd copies it
            to_b = torch.mul(chained_product(a, x.T, scaled_back).T, scales, out=torch.empty_like(b))
        if for_m and ctx.output is not None and not ctx.output.is_changed():
            to_m = (_dots(back, kept) / magnitude.flatten()).view_as(magnitude)
        elif for_m:
            inner = kept if ctx.output is None else _product(x, weight, a, b, s)
            to_m = (_dots(back, inner) / norms).view_as(magnitude)
        if for_x and ctx.updates:
            if updated is None:
                updated = torch.mul(weight, gains[:, None]).addmm_(scaled, a)
            to_x = fast_product(back, updated)
        elif for_x:
            to_x = fast_product(scaled_back, weight).addmm_(through.T, a)
        return to_x, None, None, to_a, to_b, to_m, None


def _product(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return `(W + s B A) x`."""
    return F.linear(x, weight) + scaling * F.linear(F.linear(x, a), b)


def _least(values: Tensor) -> float:
    """Return the smallest magnitude."""
    return torch.linalg.vector_norm(values, -math.inf).item()


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the dot product of each column of `x` with that of `y`, without a tensor of their size if they are large.

    It is the gradient of a layer norm's weight, where all means are zero and all variances are one.
    """
    if x.numel() < _MANY or not x.is_contiguous():
        return (x * y).sum(0)
    mean, variance = x.new_zeros(len(x), 1), x.new_ones(len(x), 1)
    backward = torch.ops.aten.native_layer_norm_backward.default
    dots: Tensor = backward(x, y, x.shape[1:], mean, variance, x.new_empty(x.shape[1]), None, [False, True, False])[1]
    return dots


class _Watch:
    """Tells whether a tensor has been changed in place since then, without keeping its memory.

    A detached tensor counts changes together with the tensor it came from, also after it was given other values.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._counter = tensor.detach()
        self._counter.data = tensor.new_empty(0)
        self._seen = tensor._version

    def is_changed(self) -> bool:
        return self._counter._version != self._seen
