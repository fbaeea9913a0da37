"""Make an eager module compute with adapters, which are found by their module paths.

No graph and no sites' calls are used. A hook adds an adapter's output to the output of a layer, or the layer's weight
is replaced while the layer runs. Only one changed weight is in memory at a time. A weight that is also read outside its
own module is changed for the whole call. Trained copies replace the base's tensors in the modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftfx.adapters.adapter import Adapter
from peftfx.bases.guests import own_class
from peftfx.contract.method import Op
from peftfx.contract.override import Override
from peftfx.contract.placement import WeightPlacement, owner_of, site_tensors
from peftfx.contract.weight import widened
from peftfx.export.verification.eager.published import KNOWN, OnOutput, acting_where, on_output
from peftfx.export.verification.eager.swapped_weight import CONV, AdapterStep, HeldTensors, SwappedWeight
from peftfx.graph.places import module_at, places_of, twin

#: The modules whose forward is one product with their weight, and nothing else.
_LINEAR = (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass
class Applied:
    """The modules that the adapters act at, and those of them that have run.

    Attributes:
        named: the paths of the modules that the adapters act at.
        seen: the paths of the named modules that have run.
    """

    named: frozenset[str] = frozenset()
    seen: set[str] = field(default_factory=set)


@contextlib.contextmanager
def applied(
    base: nn.Module, adapters: Sequence[Adapter], whole: Collection[str] = (), feed: Mapping[str, Tensor] | None = None
) -> Iterator[Applied]:
    """Make `base` compute with these adapters while this context lasts.

    Args:
        base: an eager module. It is restored afterwards.
        adapters: the adapters, in the order in which they act. Soft prompts do not act at modules: see
            `reference.py`.
        whole: the paths of modules whose weight is changed for the whole call, because it is also read elsewhere.
        feed: the inputs of the call, for adapters that act only after an invocation in the text.
    """
    steps: dict[str, list[AdapterStep]] = {}
    for adapter in adapters:
        for placement in adapter.placements.weights:
            p = {**adapter.params(placement), **acting_where(placement.method, feed or {})}
            steps.setdefault(placement.site.path, []).append(AdapterStep(placement, p))
    named = {*steps, *(path for adapter in adapters for path in adapter.named)}
    found = Applied(frozenset(named))
    with contextlib.ExitStack() as stack:
        places = places_of(base)
        for path in {*named, *(o.module for adapter in adapters for o in adapter.overrides)} & places.keys():
            _stand_alone(base, path, stack)
        for adapter in adapters:
            for override in adapter.overrides:
                _replace_copies(base, adapter, override, stack)
        for path in named:
            _watch(base, path, found, stack)
        for path, own in steps.items():
            _adapt(base, path, own, stack, whole=path in whole)
        yield found


def unpublished(adapters: Sequence[Adapter]) -> list[str]:
    """Return the weight methods without arithmetic in `published.py`. Their own `forward` or `fold` is used instead."""
    methods = (p.method for adapter in adapters for p in adapter.placements.weights)
    return sorted({type(m).__name__ for m in methods if not isinstance(m, KNOWN)})


def without_place_for_bias(base: nn.Module, adapters: Sequence[Adapter]) -> str:
    """Return the path of a module whose code reads no bias, and which an adapter gives one; empty if there is none."""
    for adapter in adapters:
        for placement in adapter.placements.weights:
            module, _ = _holder(base, placement.site.path)
            if placement.site.kind != "linear" or placement.on_weight is None or "bias" in module._parameters:
                continue
            weight, _ = site_tensors(base, placement.site)
            bare, p = placement.base(weight, None), widened(adapter.params(placement))
            if placement.method.fold(placement.view, bare, p).bias is not None:
                return placement.site.path
    return ""


def _stand_alone(base: nn.Module, path: str, stack: contextlib.ExitStack) -> None:
    """Replace the module at this path by a copy, as HF PEFT does. At other paths the module is not changed."""
    owner, leaf = owner_of(base, path)
    held = owner._modules[leaf]
    assert held is not None
    stack.callback(owner._modules.__setitem__, leaf, held)
    owner._modules[leaf] = twin(held)


def _replace_copies(base: nn.Module, adapter: Adapter, override: Override, stack: contextlib.ExitStack) -> None:
    """Put an adapter's copy of a tensor wherever modules inside the override's module hold that tensor."""
    within = base.get_submodule(override.module)
    old = getattr(*owner_of(within, override.name))
    new = adapter.get(override.key)
    if override.rows:
        new = old.index_copy(0, adapter.get(override.indices), new.to(old.dtype))
    new = new.detach()  # one object, by which the next adapter knows a tied tensor
    for module in within.modules():
        for held in (module._parameters, module._buffers):
            for name in [name for name, value in held.items() if value is old]:
                _set(held, name, new, stack)


def _set(held: HeldTensors, name: str, value: object, stack: contextlib.ExitStack) -> None:
    stack.callback(held.__setitem__, name, held[name])
    held[name] = value


def _watch(base: nn.Module, path: str, found: Applied, stack: contextlib.ExitStack) -> None:
    """Record when the module at a path runs. If the path is a parameter's, the module that holds it counts."""
    module, _ = _holder(base, path)

    def ran(module: nn.Module, args: object) -> None:
        found.seen.add(path)

    stack.callback(module.register_forward_pre_hook(ran).remove)


def _holder(base: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module at a path and its weight's name; for a parameter's path, the module that holds it."""
    module = module_at(base, path)
    return owner_of(base, path) if module is None else (module, "weight")


def _adapt(
    base: nn.Module, path: str, steps: Sequence[AdapterStep], stack: contextlib.ExitStack, *, whole: bool
) -> None:
    module, name = _holder(base, path)
    if name not in module._parameters:  # the module's weight has another name
        name = steps[0].placement.site.weight.rpartition(".")[2]
    kind, transposed = _kind(module, steps[0].placement, whole=whole)
    beside = [
        step for step in steps if step.placement.on_weight is None
    ]  # not expressible as a weight: after the steps that are
    steps = [step for step in steps if step not in beside]
    own_hooks = list(module._forward_hooks)
    _on_weight(module, name, kind, steps, stack, transposed=transposed, whole=whole)
    for step in beside:
        stack.callback(module.register_forward_hook(_own_forward(module, kind, step), with_kwargs=True).remove)
    for number in own_hooks:  # the user's hooks take the adapted output, as in a call
        module._forward_hooks[number] = module._forward_hooks.pop(number)


def _on_weight(
    module: nn.Module,
    name: str,
    kind: str,
    steps: Sequence[AdapterStep],
    stack: contextlib.ExitStack,
    *,
    transposed: bool,
    whole: bool,
) -> None:
    hooks = [_hook(module, kind, step) for step in steps]
    again = any(step.placement.method.reruns for step in steps[1:])  # a hook would run the layer without the others
    if not whole and not again and all(hook is not None for hook in hooks):
        for hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)  # type: ignore[arg-type]
        return
    swap = SwappedWeight(module, name, kind, transposed, steps)
    if whole:
        swap.put()
        stack.callback(swap.back)
        return
    stack.callback(swap.back)
    stack.callback(module.register_forward_pre_hook(lambda *_: swap.put()).remove)
    stack.callback(module.register_forward_hook(lambda *_: swap.back()).remove)


def _kind(module: nn.Module, placement: WeightPlacement, *, whole: bool) -> tuple[str, bool]:
    """Return what the module does with its weight, by its type, and whether the weight is stored [in, out].

    Where the model's code reads the weight past the module's call (`whole`), it may multiply by it the other way round.
    """
    if isinstance(module, nn.Embedding):
        return "embedding", False
    if isinstance(module, CONV):
        return "conv", False
    if isinstance(module, nn.Linear | Conv1D):
        return "linear", isinstance(module, Conv1D) or (whole and placement.site.transposed)
    return placement.site.kind, placement.site.transposed


def _hook(module: nn.Module, kind: str, step: AdapterStep) -> Callable[..., Tensor] | None:
    """Make a forward hook that does what the method does. Return None if the weight has to be replaced instead."""
    if step.placement.part is not None:
        return None
    known, own = isinstance(step.placement.method, KNOWN), own_class(module)  # without what the module hosts
    plain_embedding = own is nn.Embedding and module.max_norm is None
    if own not in _LINEAR and not plain_embedding:
        return None if known or own not in CONV else _own_forward(module, kind, step)
    if not known:
        return _own_forward(module, kind, step)
    adapted: OnOutput | None = on_output(step.placement.method, step.params, kind)
    if adapted is None:
        return None
    return lambda module, args, kwargs, y: adapted((*args, *kwargs.values())[0], y)


def _own_forward(module: nn.Module, kind: str, step: AdapterStep) -> Callable[..., Tensor]:
    """Make a hook that calls the `forward` of a method without published arithmetic."""
    op = _op(module, kind)
    bias = module._parameters.get("bias")

    def run(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        base = step.placement.base(weight, bias)
        x = (*args, *kwargs.values())[0]
        return step.placement.method.forward(step.placement.view, op, x, y, base, step.params, False)

    return run


def _op(module: nn.Module, kind: str) -> Op:
    """Return a module's own operation as a function of the weight."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if kind == "linear":
            return F.linear(x, weight, bias)
        if isinstance(module, nn.Embedding):
            return F.embedding(x, weight, module.padding_idx)
        groups, module.groups = module.groups, x.shape[1 - weight.ndim] // weight.shape[1]  # type: ignore[assignment]
        try:
            return module._conv_forward(x, weight, bias)  # type: ignore[operator]
        finally:
            module.groups = groups

    return run
