"""Attributes that code has set on a model's parameters and buffers, which the tensors of a capture do not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from peftfx.bases.guests import own_modules
from peftfx.graph.capturing.layer_kinds import NOTES

_OF_TRANSFORMERS = "_is_hf_initialized"  #: on each tensor of a loaded model


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Inside the context, a tensor that stands for one of the model's answers by the attributes of the model's own."""
    known: dict[str, list[tuple[nn.Module, str, object]]] = {}
    for _, module in own_modules(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            own = vars(tensor) if type(tensor) in (Tensor, nn.Parameter) else {}  # codes of weights are other types
            if noted := {key: value for key, value in own.items() if key != _OF_TRANSFORMERS}:
                for attribute, value in {**noted, NOTES: noted}.items():
                    known.setdefault(attribute, []).append((module, name, value))

    def read(tensor: Tensor, attribute: str) -> object:
        for module, name, value in known.get(attribute, ()):
            if tensor is module._parameters.get(name) or tensor is module._buffers.get(name):
                return value
        raise AttributeError(f"{type(tensor).__name__!r} object has no attribute {attribute!r}")

    with ExitStack() as stack:
        for kind in (FakeTensor, FunctionalTensor) if known else ():
            stack.enter_context(mock.patch.object(kind, "__getattr__", read, create=True))
        yield
