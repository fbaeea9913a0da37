"""Twin: a copy of a base's modules over the same tensors, where weights that are not at hand are read late.

A quantised layer has no weight that a graph could read, and no operator that a graph knows. Only in the twin, torch's
own linear layer replaces it, whose weight is the layer's codes (`Coded`). Weights that are offloaded, or partitioned by
ZeRO-3, are `Fetched`, and Accelerate's hooks are left out. So sites are found, and adapters made, merged and exported,
as over a base in floating point, but without a copy of the base. Training runs the base itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.bases.guests import GUESTS, own_class, own_modules
from peftfx.errors import PeftfxError
from peftfx.graph.lazy_weights import store
from peftfx.quantisation.coded import Coded
from peftfx.quantisation.codes import Codes
from peftfx.twins.layers import codes_in, is_quantised
from peftfx.twins.offloaded import HOOK, OWN_FORWARD, fetched, is_hooked
from peftfx.twins.partitioned import partitioned
from peftfx.twins.repacked import PlainForms, keep_plain, unpack_all
from peftfx.twins.trial import device_of, own_tensors, try_layer

_HELD = ("_parameters", "_buffers", "_modules")


class Twin:
    """The twin of a base, made at the first use. For a base in floating point it is the base itself.

    Attributes:
        obstacles: why a layer of the base cannot be trained through, by the layer's path.
        offloaded: whether some weights are offloaded; known once the twin is made.
        plain: the base's layers that bitsandbytes may repack. A copy or a move would spoil repacked layers.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.obstacles: dict[str, str] = {}
        self.offloaded = False
        self.plain = PlainForms()
        self._codes: dict[str, Codes] = {}
        self._made: dict[int, nn.Module] = {}
        self._module: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The twin's module, with the modes and attributes that the base's modules have now.

        Raises:
            PeftfxError: a layer is quantised in a way that peftfx cannot read, or does not compute what its codes say;
                or the base has other modules than it had.
        """
        if self._module is None:
            self._module = self._make()
        if self._module is not self.base:
            for path, own in own_modules(self.base):
                made = self._made.get(id(own))
                if made is None:
                    raise _unknown(path, own)
                vars(made).update({"training": own.training} if isinstance(made, _Linear) else _attributes(own, made))
        return self._module

    @property
    def formats(self) -> Mapping[str, str]:
        """The storage format of each quantised layer, by the layer's path."""
        return {path: codes.format for path, codes in self._codes.items()} if self.module is not self.base else {}

    def floating(self) -> nn.Module:
        """Return a lazy copy of the twin in eval mode, for export. For a quantised base it is in float32."""
        made = copied(self.module)
        if not self._codes:
            return made.eval()
        for _, module in made.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(weight, Coded):
                wide = Coded(weight.codes, views=weight.views)
                module._parameters["weight"] = nn.Parameter(wide, requires_grad=False)
        store(made, lambda _: torch.float32)
        configs: dict[int, object] = {}
        for _, module in made.named_modules():
            module._buffers = {k: None if b is None else _wide(b) for k, b in module._buffers.items()}
            config: Any = getattr(module, "config", None)
            if hasattr(config, "quantization_config"):
                if id(config) not in configs:
                    configs[id(config)] = plain = copy.copy(config)
                    del plain.quantization_config
                    plain.dtype = torch.float32
                module.config = configs[id(config)]
        return made.eval()

    def _make(self) -> nn.Module:
        config = _config_of(self.base)
        modules = dict(own_modules(self.base))
        offloaded, parts = fetched(own_modules(self.base)), partitioned(modules.values())
        self.offloaded, elsewhere = bool(offloaded), {**offloaded, **parts}
        for path, module in modules.items():
            if not is_quantised(module):
                continue
            if any(id(t) in offloaded for t in own_tensors(module)):
                hint = (
                    "keep the layer on its device: give from_pretrained a device_map without cpu and disk for the layer"
                )
                raise PeftfxError("the codes of this quantised layer are offloaded", path, hint)
            if any(id(t) in parts for t in own_tensors(module)):
                what = "DeepSpeed's ZeRO-3 has partitioned the codes of this quantised layer"
                raise PeftfxError(what, path, "use ZeRO-2, or the unquantised model")
        unpack_all(modules)
        keep_plain(modules.values())
        found = {path: codes_in(module, path, config) for path, module in modules.items()}
        self.plain = PlainForms(modules.values())
        self._codes = {path: codes for path, codes in found.items() if codes is not None}
        if not self._codes and not elsewhere and not any(map(is_hooked, modules.values())):
            return self.base
        flowing = _dtype_of(self.base)
        kinds: dict[object, str] = {}
        for path, codes in self._codes.items():
            own = modules[path]
            self._made[id(own)] = layer = _linear(own, codes, flowing)
            kind = type(own), codes.format, codes.shape  # kernels may do some sizes alone
            if kind not in kinds:
                kinds[kind] = try_layer(path, own, layer, codes, flowing)
            if kinds[kind]:
                self.obstacles[path] = kinds[kind]
        return copied(self.base, elsewhere, self._made)


def _unknown(path: str, module: nn.Module) -> PeftfxError:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    what = f"other code has put a module of its own into the base since the base was adapted: a {kind}"
    hint = "take it out again (peft: unload() of the model that it made), or give peft a copy of the base"
    return PeftfxError(what, path, hint)


def _dtype_of(base: nn.Module) -> torch.dtype:
    """Return the dtype of the values between a base's layers: that of its first weight that is not quantised."""
    plain = (p.dtype for p in base.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16))
    return next(plain, torch.float32)


def _linear(own: nn.Module, codes: Codes, dtype: torch.dtype) -> nn.Linear:
    """Return torch's own linear layer with these codes as its weight."""
    made = _Linear.__new__(_Linear)
    nn.Module.__init__(made)
    made.out_features, made.in_features = codes.shape
    device = device_of(own)
    made.register_parameter("weight", nn.Parameter(Coded(codes, dtype, device=device), requires_grad=False))
    bias = own._parameters.get("bias", own._buffers.get("bias"))
    made.register_parameter(
        "bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, False)
    )
    made.training = own.training
    return made


class _Linear(nn.Linear):
    """A torch linear layer that computes in its input's dtype, as quantised layers do."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def open_quantised(base: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Replace each quantised layer at these `paths` by torch's own layer, still without a weight.

    Returns:
        The storage format of each replaced layer, by its path.
    """
    found: dict[str, str] = {}
    for path in paths:
        own = base.get_submodule(path)
        codes = codes_in(own, path, _config_of(base)) if is_quantised(own) else None
        if codes is None:
            continue
        made = nn.Linear(codes.columns, codes.rows, bias=False, device="meta")
        made.weight = nn.Parameter(torch.empty(0, device=device_of(own)), requires_grad=False)
        made.register_parameter("bias", own._parameters.get("bias"))
        made._forward_hooks, made._forward_pre_hooks = own._forward_hooks, own._forward_pre_hooks
        made.training = own.training
        base.set_submodule(path, made)
        found[path] = codes.format
    return found


def _config_of(base: nn.Module) -> Mapping[str, object]:
    """Return the quantisation config of a base, or an empty mapping."""
    said = getattr(getattr(base, "config", None), "quantization_config", None)
    if isinstance(said, Mapping):
        return said
    return said.to_dict() if said is not None and hasattr(said, "to_dict") else {}


def copied(
    module: nn.Module, tensors: Mapping[int, Tensor] = MappingProxyType({}), made: dict[int, nn.Module] | None = None
) -> nn.Module:
    """Return a copy of a module, of its own class, without what adapters put into it.

    Args:
        module: the module to copy, with the modules in it.
        tensors: replacements of the module's tensors, by the ids of the replaced tensors; all other tensors are shared.
        made: the copies by the ids of the copied modules; new copies are added, and existing copies are used again.
    """
    made = {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    result = made[id(module)] = object.__new__(own_class(module))
    own = _attributes(module, result).items()
    vars(result).update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in own})
    for name in ("_parameters", "_buffers"):
        vars(result)[name] = {k: tensors.get(id(t), t) for k, t in vars(module)[name].items()}
    children = {k: m for k, m in module._modules.items() if k != GUESTS}
    vars(result)["_modules"] = {k: None if m is None else copied(m, tensors, made) for k, m in children.items()}
    return result


def _attributes(module: nn.Module, result: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes for a copy. A forward set on the instance is bound to the copy."""
    found = {k: v for k, v in vars(module).items() if k not in _HELD}
    if is_hooked(module):  # a twin runs without hooks, and without the forward that they set
        found = {k: v for k, v in found.items() if k not in (HOOK, OWN_FORWARD, "forward")}
    forward = found.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:
        found["forward"] = MethodType(forward.__func__, result)
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
