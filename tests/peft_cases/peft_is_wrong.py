"""Where HF PEFT's numbers are not those of its own formula, and the arithmetic that shows it.

Each is a mend: one step of HF PEFT's model, done in another way on HF PEFT's own tensors. A result that differs from
HF PEFT's and is equal to what it gives when mended is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class Mend:
    """What is mended in HF PEFT's model, in place, and why; `told`: a user is warned, for outputs are others."""

    apply: Callable[[nn.Module], None]
    why: str
    told: bool = True


def mend_of(options: Mapping[str, object], model: nn.Module) -> Mend | None:
    """The mend of a case, by its options and its model."""
    if options.get("use_effective_conv2d"):
        return CORES
    grouped = any(getattr(module, "groups", 1) > 1 for module in model.modules())
    if options.get("use_dora") and grouped:
        return GROUPED_DORA
    return HALF_OF_IT if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()) else None


def _norms_of_what_is_computed(theirs: nn.Module) -> None:
    """The norms of DoRA at convs of several groups: of the kernel that `lora_B(lora_A(x))` has, read by impulses."""
    for layer in list(theirs.modules()):
        for name, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
            if getattr(layer.base_layer, "groups", 1) > 1:
                norm = _Norm(layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.scaling[name])
                magnitude.get_weight_norm = norm


@dataclass(frozen=True)
class _Norm:
    """In place of a layer's `get_weight_norm`, with the same arguments; it reads the layer's own tensors instead."""

    base: nn.Module
    first: nn.Module
    second: nn.Module
    scaling: float

    @torch.no_grad()
    def __call__(self, *_: object, **__: object) -> Tensor:
        weight, groups = self.base.weight, self.base.groups
        inner, kernel = weight.shape[1] * groups, weight.shape[2:]
        patches = torch.eye(inner * kernel.numel()).view(-1, inner, *kernel)  # each has a single 1 in it
        conv = CONVS[weight.ndim]
        update = conv(conv(patches, self.first.weight), self.second.weight, groups=self.second.groups)
        plain = conv(patches, weight, groups=groups)
        rows = (plain + self.scaling * update).flatten(1)  # [patches, out]
        return rows.norm(dim=0).view(1, -1, *(1 for _ in kernel))


GROUPED_DORA = Mend(
    _norms_of_what_is_computed,
    "DoRA divides by the norm of each output's row of `W + s B A`. At a conv of g groups B is [out, r / g]. HF PEFT "
    "reshapes it to [out / g, r] and multiplies it by A, [r, in * kernel]: rows of that product mix outputs, and it is "
    "not the update that `lora_B(lora_A(x))` computes. With the norms of that update, whose kernel is read from HF "
    "PEFT's own layers by single ones as inputs, HF PEFT's own formula gives our numbers.",
)


def _whole_gradient(theirs: nn.Module) -> None:
    for name, parameter in theirs.named_parameters():
        if ".out_proj.lora_" in name:
            parameter.register_hook(lambda gradient: 2 * gradient)


HALF_OF_IT = Mend(
    _whole_gradient,
    "HF PEFT adds the update of an attention's output projection twice, and differentiates one of the two: its "
    "gradient there is half of what its own loss changes by (central differences in float64: "
    "`test_pefts_gradient_at_an_attentions_output_is_half_of_what_its_loss_changes_by`). Twice that is our gradient.",
    told=False,
)


def _gradients_of_cores(theirs: nn.Module) -> None:
    """LoHa's update of a conv with a core, by torch's own gradients."""
    for layer in list(theirs.modules()):
        if getattr(layer, "hada_t1", {}):
            layer.get_delta_weight = functools.partial(_hadamard, layer)


def _hadamard(layer: nn.Module, adapter: str, **_: object) -> Tensor:
    sides = ((layer.hada_t1, layer.hada_w1_a, layer.hada_w1_b), (layer.hada_t2, layer.hada_w2_a, layer.hada_w2_b))
    one, other = (torch.einsum("ijkl,ip,jq->pqkl", *(part[adapter] for part in side)) for side in sides)
    return (one * other * layer.scaling[adapter]).reshape(layer.get_base_layer().weight.shape)


CORES = Mend(
    _gradients_of_cores,
    "HF PEFT writes out the gradients of LoHa's update with a core (`HadaWeightCP.backward`), and takes the other "
    "product's core for those of `hada_w1_a` and `hada_w2_a`. By torch's own gradients of the same forward "
    "they are ours.",
    told=False,
)
