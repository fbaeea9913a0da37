"""Choose which layers of a merged model are rounded in its files, and to what. Say why the others are not."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from peftfx.adapters.deferred import Deferred
from peftfx.errors import PeftfxError
from peftfx.export.checkpoint.packing import BITSANDBYTES, TABLE, Packing, print_of, quantisation_config
from peftfx.export.coded.schemes import ROUTER_LEFT, routers_in, scheme_for
from peftfx.export.rounding.calibrated import Candidate
from peftfx.export.verification.comparison import VerificationError
from peftfx.export_options.quantize import Scheme
from peftfx.graph.graph import DERIVED
from peftfx.graph.lazy_weights import exact
from peftfx.quantisation.coded import Coded
from peftfx.quantisation.rounding import Rounded
from peftfx.sites.sites import Sites

_IN_ONNX = "leave quantize out, or quantise it in an export to ONNX (peftfx export --quantize)"
_NEAR = 1e-5  #: tolerance of a print that is computed again, summed in another order, relative to its largest number


@dataclass(frozen=True)
class Requantised:
    """The layers that are rounded in a model's files, and those that are not.

    Attributes:
        packings: how linear layers are rounded, by their paths.
        left: why each other linear layer stays in floating point, by its path.
        beside: why other weights of products stay in floating point, by their names.
        dtype: the dtype that the model computes in.
    """

    packings: Mapping[str, Packing]
    left: Mapping[str, str]
    beside: Mapping[str, str]
    dtype: torch.dtype

    @staticmethod
    def of(
        model: Any, sites: Sites, schemes: Sequence[Scheme], dtype: torch.dtype, plain: Collection[str]
    ) -> Requantised:
        """Choose the layers that the schemes pick.

        A scheme without a target leaves out routers, and what transformers leaves out when it quantises: the head, and
        tied weights.

        Args:
            model: the merged transformers model.
            sites: the sites of the base.
            schemes: how weights are rounded. If several pick one layer, the last one counts.
            dtype: the dtype of scales and of weights that are not rounded.
            plain: the names of the parameters that files hold unchanged: see `plain_names`.

        Raises:
            PeftfxError: a scheme names a layer that cannot be rounded, or no layer can be rounded.
        """
        choose, apart = scheme_for(sites, schemes), set(get_keys_to_not_convert(model))
        routers = routers_in(sites) if any(not scheme.target for scheme in schemes) else set()
        named = {match.site.path for s in schemes if s.target and s.kind != "none" for match in sites.select(s.target)}
        shared = _shared(model)
        packings, left = dict[str, Packing](), dict[str, str]()
        for path, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            scheme = choose(f"{DERIVED}.{path}.weight")
            why = "" if scheme is None else _obstacle(path, module, scheme, shared, plain)
            if scheme is not None and why and path in named:
                hint = "name other layers, or leave this one: none@ its path"
                raise PeftfxError(f"this layer cannot be {scheme.kind} in a file: {why}", path, hint)
            if scheme is None or why or (path in apart and path not in named):
                unasked = ROUTER_LEFT if f"{DERIVED}.{path}.weight" in routers else "it is not asked for"
                left[path] = why or (unasked if scheme is None else "transformers leaves it, too")
            else:
                packings[path] = Packing(replace(scheme, target=""), dtype)
        odd = sorted(named - packings.keys())
        if odd:
            hint = "files hold rounded weights of torch's linear layers alone; export it to ONNX instead"
            raise PeftfxError("a layer that is to be rounded is no linear layer", ", ".join(odd[:3]), hint)
        beside = {path: why for path, why in _beside(model).items() if path not in left}
        if not packings:
            why = next(iter((beside | left).values()), "it has no linear layers")
            raise PeftfxError(f"nothing of this model can be rounded: {why}", "quantize", _IN_ONNX)
        return Requantised(packings, left, beside, dtype)

    def config(self) -> dict[str, Any]:
        """Make the model's `quantization_config`.

        Raises:
            PeftfxError: transformers would confuse the name of a rounded layer with that of a layer which is not
                rounded.
        """
        found = quantisation_config(self.packings, list(self.left), self.dtype)
        if found["quant_method"] == BITSANDBYTES:
            wrong = [path for path in self.packings if not should_convert_module(path, list(self.left))]
            if wrong:
                what = "transformers would read this layer as not rounded: it compares the ends of names"
                raise PeftfxError(what, ", ".join(wrong[:3]), "round to int4 or int8, whose files name layers whole")
        return found

    @property
    def schemes(self) -> dict[str, list[str]]:
        """The paths of the rounded layers, by scheme."""
        found: dict[str, list[str]] = {}
        for path, packing in self.packings.items():
            found.setdefault(str(packing.scheme), []).append(path)
        return found

    @property
    def lost(self) -> dict[str, float]:
        """The norm of each weight's rounding error, relative to the weight's norm."""
        return {path: packing.lost for path, packing in self.packings.items()}

    def candidates(self, model: nn.Module) -> Iterator[Candidate]:
        """Yield the layers that GPTQ is asked for, by their paths in the merged model."""
        for path, packing in self.packings.items():
            if packing.scheme.gptq:
                p = model.get_submodule(path)._parameters["weight"]
                assert p is not None
                late = p.detach()
                read = late.value if isinstance(late, Deferred) else functools.partial(exact, late)
                yield Candidate(path, [path], read, packing.scheme, signed=False, dtype=packing.dtype)

    def take(self, fitted: Mapping[object, Rounded]) -> None:
        """Take weights that GPTQ has rounded already, by their layers' paths."""
        for path, made in fitted.items():
            self.packings[str(path)].fitted = made

    def check(self, loaded: nn.Module, where: str) -> None:
        """Compare the weights of a model that was loaded again with the weights that were written.

        Raises:
            VerificationError: a layer has other values, or its codes are not in the files.
        """
        for path, packing in self.packings.items():
            weight = loaded.get_submodule(path)._parameters["weight"]
            if not isinstance(weight, Coded):
                raise VerificationError(f"the codes of {path} are not in the files", where, "report this model")
            got, want = print_of(weight.codes.dequantise()), packing.print
            assert want is not None
            if not float((got - want).abs().max()) <= _NEAR * max(1.0, float(want.abs().max())):
                raise VerificationError(f"{path} has other values when it is read again", where, "report this model")


def _obstacle(path: str, module: nn.Linear, scheme: Scheme, shared: Collection[int], plain: Collection[str]) -> str:
    if type(module) is not nn.Linear:
        replaced = "transformers puts bitsandbytes' layers in the place of nn.Linear itself alone"
        if scheme.kind != TABLE:
            replaced = "some versions of compressed-tensors put nn.Linear's forward in its place"
        return f"it is a {type(module).__name__}, a subclass of nn.Linear: {replaced}"
    if id(module._parameters.get("weight")) in shared:
        return "its weight is another module's, too"
    if module.in_features % scheme.block:
        return f"its {module.in_features} columns are no whole blocks of {scheme.block}"
    if f"{path}.weight" not in plain:
        return "transformers puts its weight together from others in the files"
    return ""


def _beside(model: nn.Module) -> dict[str, str]:
    """Say why other weights of products are not rounded: these formats hold only linear layers' weights."""
    found = {path: "it is a Conv1D" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if p.ndim == 3 and p.is_floating_point() and not isinstance(owner, nn.modules.conv._ConvNd):
            found[name] = f"it is a stack of weights {list(p.shape)}"
    return found


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules hold."""
    found: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), set()).add(name)
    return {number for number, names in found.items() if len(names) > 1}
