"""The class `SeenByTrainers`: what Trainer, Accelerate and torch.func ask of a model without calling it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from peftfx.bases.guests import is_guest, own_class
from peftfx.errors import PeftfxError
from peftfx.graph.graph import BASE

_T = TypeVar("_T")
_PREPARER = "prepare_model_for_kbit_training"  #: of `peft`, and of TRL, whose trainers call it on adapted models, too
_MIXER = "_sync_target_model"  #: of TRL's `SyncRefModelCallback`


class SeenByTrainers(nn.Module):
    """A module around a base: it answers by the base's class, and has each of its parameters under one name."""

    base: nn.Module

    _hf_peft_config_loaded = True
    """What transformers' `Trainer` asks before it trains a quantised model: the weights that it trains are adapters."""

    def _get_name(self) -> str:
        """Return the name of the base's class, by which `Trainer` knows whether labels are shifted."""
        return own_class(self.base).__name__

    def get_parameter_or_buffer(self, target: str) -> Tensor:
        """Return the parameter or the buffer of this name; Accelerate asks transformers' models so.

        Args:
            target: a name as `named_parameters` and `named_buffers` have it.
        """
        try:
            return self.get_parameter(target)
        except AttributeError:
            return self.get_buffer(target)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the parameters: those of the adapters, and of the base.

        Args:
            recurse: whether to return the parameters of modules inside, too.

        Raises:
            PeftfxError: TRL asks for them to mix them into those of a reference model, which has others.
        """
        if sys._getframe(1).f_code.co_name == _MIXER:
            raise no_mixing()
        return super().parameters(recurse)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by name. The adapters' have no second name for their places in the base's modules.

        Otherwise `torch.func.functional_call` takes them for tied parameters, and exchanges one tensor twice. Code that
        prepares a quantised base for training gets the base's parameters alone: it freezes all that it gets.

        Args:
            prefix: what comes before each name.
            recurse: whether to yield the parameters of modules inside, too.
            remove_duplicate: whether to yield a parameter that has several names once.
        """
        found = _once(super().named_parameters(prefix, recurse, remove_duplicate))
        if sys._getframe(1).f_code.co_name == _PREPARER:
            return ((name, p) for name, p in found if name.startswith(f"{BASE}."))
        return found

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers by name, each of an adapter's under one name.

        Args:
            prefix: what comes before each name.
            recurse: whether to yield the buffers of modules inside, too.
            remove_duplicate: whether to yield a buffer that has several names once.
        """
        return _once(super().named_buffers(prefix, recurse, remove_duplicate))


def no_mixing() -> PeftfxError:
    """Return the error for a reference model whose parameters are to be mixed with those of an adapted model."""
    what = "sync_ref_model mixes the parameters of two whole models, and the reference of an adapter has others"
    hint = (
        "pass sync_ref_model=False; to renew the reference, copy the adapter's state: "
        "set_peft_model_state_dict(model, get_peft_model_state_dict(model), 'ref')"
    )
    return PeftfxError(what, "sync_ref_model=True", hint)


def _once(named: Iterator[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    return ((name, value) for name, value in named if not is_guest(name))
