"""bitsandbytes' layers of 4 bits that it has repacked in place, as it does in eval mode on some CPUs.

The repacked form has the same codes in another order, and scales that are rounded to bfloat16. It serves only kernels
without gradients. bitsandbytes' own way back (`Linear4bit.state_dict`) leaves the scales out of order, so here they are
put in order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.errors import how_many, warn

#: What reports say, behind the format, of scales that were rounded.
ROUNDED = "with scales that bitsandbytes rounded to bfloat16"
_REPACKS = "support_avx512bf16_for_cpu"  #: the attribute of a layer by which it is repacked
_ROWS = 32  #: the repacked form has so many rows side by side


class PlainForms:
    """What layers of 4 bits hold in their plain form, so that they can get it back, with unrounded scales.

    Args:
        modules: any modules; those that bitsandbytes may repack are in their plain form now.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        states = ((module, getattr(_weight(module), "quant_state", None)) for module in modules)
        self._forms = [_PlainForm(module) for module, state in states if hasattr(state, "absmax")]

    def restore(self) -> None:
        """Put all repacked layers back."""
        for form in self._forms:
            form.restore()

    @contextmanager
    def passing_gradients(self, *, everywhere: bool) -> Iterator[None]:
        """Let no layer that a gradient must pass be in its repacked form, until the `with` block ends.

        Args:
            everywhere: whether all layers are put back now. Otherwise a layer is put back when its input has a
                gradient, and others keep their repacked form, which would take time to make again.
        """
        if everywhere:
            self.restore()
        repacked = [form for form in self._forms if form.is_lost]
        handles = [form.module.register_forward_pre_hook(form.restore_before, with_kwargs=True) for form in repacked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _PlainForm:
    def __init__(self, module: nn.Module) -> None:
        self.module, self._weight = module, _weight(module)
        self._data, self._state = self._weight.data, copy.copy(self._weight.quant_state)

    @property
    def is_lost(self) -> bool:
        """Whether the layer has been repacked since then."""
        return _weight(self.module) is self._weight and is_repacked(self.module)

    def restore(self) -> None:
        if self.is_lost:
            _put(self.module, self._data, copy.copy(self._state))

    def restore_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
            self.restore()


def is_repacked(module: nn.Module) -> bool:
    """Return whether a layer is in its repacked form, or has scales that are still in the order of that form."""
    state = getattr(_weight(module), "quant_state", None)
    return (
        bool(getattr(state, "packing_format_for_cpu", False)) or getattr(getattr(state, "absmax", None), "ndim", 1) > 1
    )


def has_rounded_scales(module: nn.Module) -> bool:
    """Return whether a layer's scales are those of its repacked form, also if its form is plain again."""
    return hasattr(getattr(_weight(module), "quant_state", None), "original_qshape")


def unpack_all(modules: Mapping[str, nn.Module]) -> None:
    """Put repacked layers into their plain form, and warn that bitsandbytes has rounded their scales."""
    found = [path for path, module in modules.items() if is_repacked(module)]
    for path in found:
        _put(modules[path], *_plain(modules[path]))
    if found:
        warn(
            f"bitsandbytes has rounded the scales of {how_many(len(found), 'layer')} of 4 bits ({found[0]} first) to "
            "bfloat16, because the model has run in eval mode before: merges and exports have these scales, with which "
            "they compute now; to have the scales of the files, load the base again and adapt it before it runs"
        )


def keep_plain(modules: Iterable[nn.Module]) -> None:
    """Let layers of sizes that have no repacked form compute in their plain form.

    bitsandbytes repacks them too, and then ends with words about blocks.
    """
    for module in modules:
        state = getattr(_weight(module), "quant_state", None)
        if state is not None and getattr(module, _REPACKS, False):
            rows, columns = state.shape
            if rows % _ROWS or columns % state.blocksize:
                setattr(module, _REPACKS, False)


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a repacked layer would save in its plain form; the layer stays as it is."""
    data, state = _plain(module)
    return {"weight": data, **{f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}


def _plain(module: nn.Module) -> tuple[Tensor, Any]:
    from bitsandbytes import functional

    weight = _weight(module)
    data, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):  # a file has scales out of order without this mark
        state.original_nested = False  # otherwise the scales are rounded once more, to 8 bits
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
    return data, state


def _put(module: nn.Module, data: Tensor, state: Any) -> None:
    weight = _weight(module)
    own = vars(module).get("quant_state")
    if own is not None and own is weight.quant_state:
        module.quant_state = state
    weight.data, weight.quant_state = data, state


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")
