"""The view of a model's layers, each by itself, in which sites are found if the model's own code cannot be captured.

    input_0_0, input_1_0, ... -> output_0, output_1, ...

The layers are those that one call of the model runs: modules with parameters of their own, and without modules inside.
How the model's code leads from one layer to the next is in no graph. So sites have no roles here but their kinds, and
nothing is served by this view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from peftfx.analysis.running import LAYERS
from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError
from peftfx.graph.contexts import unchanged
from peftfx.sharding.fsdp import reshard
from peftfx.sharding.models import is_sharded
from peftfx.views.capture import capture
from peftfx.views.view import Axes, View, WithoutPast, as_captured


@dataclass(frozen=True)
class LoneInput:
    """An argument of a layer's call: what is like it is zeros.

    Attributes:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class LoneCall:
    """One call of a layer.

    Attributes:
        path: the layer's path.
        inputs: what the layer got, in order.
    """

    path: str
    inputs: tuple[LoneInput, ...]

    def made(self, base: nn.Module) -> list[Tensor]:
        """Return inputs like those of the call, where the layer is now, and in the layer's present precision.

        Args:
            base: the model.
        """
        own = list(base.get_submodule(self.path).parameters(recurse=False))
        present = next((p.dtype for p in own if p.is_floating_point()), None)
        dtypes = [present or i.dtype if i.dtype.is_floating_point else i.dtype for i in self.inputs]
        device = torch.device("cpu") if own[0].is_meta else own[0].device
        return [torch.zeros(i.shape, dtype=d, device=device) for i, d in zip(self.inputs, dtypes, strict=True)]


@dataclass(frozen=True)
class LoneLayers(WithoutPast):
    """The layers of a model, each called by itself.

    Attributes:
        calls: one call of each layer.
    """

    calls: tuple[LoneCall, ...]
    name = "layers"
    prefix: ClassVar[str] = "input"  #: of the names of the layers' inputs
    trials: ClassVar[tuple[Mapping[str, int], ...]] = ({},)

    @property
    def paths(self) -> frozenset[str]:
        """The paths of the layers."""
        return frozenset(call.path for call in self.calls)

    @property
    def lone(self) -> frozenset[str]:
        """The paths of all layers of which it is not known what flows to and from them."""
        return self.paths

    @property
    def axes(self) -> Axes:
        """The names of the axes: none, so that all sizes are those of the calls."""
        return {
            self._input(i, j): (None,) * len(given.shape)
            for i, call in enumerate(self.calls)
            for j, given in enumerate(call.inputs)
        }

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return the inputs of each layer."""
        return {self._input(i, j): t for i, call in enumerate(self.calls) for j, t in enumerate(call.made(base))}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run each layer on its inputs."""
        return {
            f"output_{i}": base.get_submodule(call.path)(*(inputs[self._input(i, j)] for j in range(len(call.inputs))))
            for i, call in enumerate(self.calls)
        }

    def _input(self, layer: int, index: int) -> str:
        return f"{self.prefix}_{layer}_{index}"


@dataclass(frozen=True)
class Widened(LoneLayers):
    """A view, and beside it layers that it does not run or whose results it does not use, each called by itself.

    Attributes:
        view: the view; None is the forward.
    """

    view: View | None = None
    name = "widened"
    prefix = "beside"

    @property
    def lone(self) -> frozenset[str]:
        """The paths of all layers of which it is not known what flows to and from them."""
        return self.paths | (self.view.lone if isinstance(self.view, LoneLayers) else frozenset())

    @property
    def axes(self) -> Axes:
        """The names of the axes."""
        return {**({} if self.view is None else self.view.axes), **super().axes}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return the inputs of the view, if it is not the forward, and of each layer."""
        own = {} if self.view is None else self.view.inputs(base, sizes=sizes, seed=seed)
        return {**own, **super().inputs(base)}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Any]:
        """Run the view, and each layer."""
        added = super().inputs(base).keys()
        own = {name: value for name, value in inputs.items() if name not in added}
        output = base(**own) if self.view is None else self.view(base, own)
        return {"output": output, **super().__call__(base, inputs)}


def find_lone_layers(base: nn.Module, readable: nn.Module, inputs: Mapping[str, object]) -> LoneLayers | None:
    """Return the view of the layers that a call of a model runs; None if the model's own code raises an error in it.

    The call is run once, on real tensors and without gradients. The model's attributes, and torch's random numbers,
    are as before afterwards. A layer whose own code cannot be captured is left out.

    Args:
        base: the model.
        readable: the model with readable weights: itself, or its twin.
        inputs: keyword arguments of the call.
    """
    calls: dict[str, LoneCall | None] = {}
    with ExitStack() as stack:
        for path, module in own_modules(base):
            if next(module.parameters(recurse=False), None) is not None and next(module.children(), None) is None:
                stack.enter_context(module.register_forward_hook(_noting(path, calls), with_kwargs=True))
        kept = nullcontext() if is_sharded(base) else unchanged(base)  # FSDP2 sets its state up in the first call
        for context in (torch.random.fork_rng(), torch.no_grad(), kept, as_captured(base)):
            stack.enter_context(context)
        device = next((p.device for p in base.parameters() if not p.is_meta), torch.device("cpu"))
        try:
            base(**pytree.tree_map_only(Tensor, lambda t: t.to(device), dict(inputs)))
        except Exception:  # a model's code raises various errors; that of the capture says what to do
            return None
        finally:
            reshard(base)
    known: dict[object, bool] = {}
    plain = [call for call in calls.values() if call is not None]
    return LoneLayers(tuple(call for call in plain if _is_capturable(call, readable, known)))


def lone_call(module: nn.Module, path: str) -> LoneCall | None:
    """Return a call of one of torch's own layers, or of transformers' `Conv1D`; None for another module.

    Args:
        module: the module.
        path: its path.
    """
    weight = getattr(module, "weight", None)
    kind = next((k for k in LAYERS if isinstance(module, k) and type(module).forward is k.forward), None)
    if kind is None or not isinstance(weight, nn.Parameter):
        return None
    if kind is nn.Embedding:
        return LoneCall(path, (LoneInput((1, 1), torch.long),))
    if kind is nn.Linear or kind is Conv1D:
        features = weight.shape[1] if kind is nn.Linear else weight.shape[0]
        return LoneCall(path, (LoneInput((1, 1, features), weight.dtype),))
    conv: Any = module
    sides = (d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return LoneCall(path, (LoneInput((1, conv.in_channels, *sides), weight.dtype),))


_Hook = Callable[[nn.Module, tuple[object, ...], dict[str, object], object], None]


def _noting(path: str, calls: dict[str, LoneCall | None]) -> _Hook:
    """Return a hook that notes the first call of a layer; None if a call has more than tensors in, and one out."""

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        given = [LoneInput(tuple(a.shape), a.dtype) for a in args if isinstance(a, Tensor)]
        if kwargs or not given or len(given) < len(args) or not isinstance(output, Tensor):
            calls[path] = None
        elif path not in calls:
            calls[path] = LoneCall(path, tuple(given))

    return note


def _is_capturable(call: LoneCall, base: nn.Module, known: dict[object, bool]) -> bool:
    """Return whether the code of a layer can be captured: of layers of one class and size, one is tried."""
    kind = type(base.get_submodule(call.path)), call.inputs
    if kind not in known:
        alone = LoneLayers((call,))
        try:
            capture(base, alone.inputs(base), axes=alone.axes, call=alone)
        except PeftfxError:
            known[kind] = False
        else:
            known[kind] = True
    return known[kind]
