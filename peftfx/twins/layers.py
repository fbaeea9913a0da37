"""`codes_in` reads the codes of a quantised layer in memory as those of a file, without the quantiser's package."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from peftfx.errors import PeftfxError
from peftfx.quantisation import awq, bitsandbytes4, bitsandbytes8, compressed, fp8, gptq
from peftfx.quantisation.coded import Coded
from peftfx.quantisation.codes import Codes
from peftfx.quantisation.packed import Packed
from peftfx.twins import quantisers
from peftfx.twins.repacked import ROUNDED, has_rounded_scales, is_repacked, plain_tensors

_HINT = "use the unquantised model, or bitsandbytes, torchao, GPTQ, AWQ or fp8 linears"
_ROUNDS = "has_fp16_weights"  #: attribute of a weight in floating point that bitsandbytes rounds to 8 bits in a call
_NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32, fp8.E4M3, torch.float8_e5m2)
#: The format of a layer that has a tensor of this name; the first entry that fits counts.
_BY_NAME = (
    *((mark, bitsandbytes4) for mark in bitsandbytes4.MARKS),
    *((mark, bitsandbytes8) for mark in bitsandbytes8.MARKS),
    ("g_idx", gptq),
    ("qweight", awq),
    ("weight_packed", compressed),
    ("weight_scale_inv", fp8),
    ("weight_scale", compressed),
)


def codes_in(module: nn.Module, path: str, config: Mapping[str, object]) -> Codes | None:
    """Return the codes of a linear layer, or None for a module whose weights are not quantised.

    Args:
        module: a module of the model.
        path: the module's path in the model.
        config: the model's `quantization_config`, for what the layer itself does not say.

    Raises:
        PeftfxError: the module is quantised in a way that peftfx cannot read.
    """
    quantised = _quantised(module)
    if not quantised:
        return None
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Embedding):
        raise _unread(module, path, quantised)
    if quantised == ["weight"] and quantisers.is_of_quantiser(weight):
        assert weight is not None
        if weight.ndim != 2:
            raise _unread(module, path, quantised)
        return quantisers.read(weight)
    own: dict[str, Tensor] = {}
    if is_repacked(module):
        own = plain_tensors(module)
    elif _is_rounded_late(weight):
        own = _rounded(weight)  # type: ignore[arg-type]
    else:
        module._save_to_state_dict(own, "", False)
    found = next((form for mark, form in _BY_NAME if mark in own), None)
    if found is None:
        raise _unread(module, path, own or quantised)
    said = {**config, **{name: value for name, value in vars(module).items() if isinstance(value, int | str)}}
    tensors = {name: tensor.cpu() for name, tensor in own.items() if name in found.NAMES}
    codes: Codes = found.read(Packed(path, tensors, said, f"a {type(module).__name__} in memory", _HINT))
    if has_rounded_scales(module):
        return dataclasses.replace(codes, format=f"{codes.format} {ROUNDED}")
    return codes


def _unread(module: nn.Module, path: str, names: Iterable[str]) -> PeftfxError:
    what = (
        f"peftfx cannot read a layer that is quantised in this way: a {type(module).__name__} with {', '.join(names)}"
    )
    return PeftfxError(what, path, _HINT)


def is_quantised(module: nn.Module) -> bool:
    """Return whether a module's own weights are quantised, in any way."""
    return bool(_quantised(module))


def _quantised(module: nn.Module) -> list[str]:
    weights = ((n, t) for n, t in module._buffers.items() if "weight" in n)
    held = (*module._parameters.items(), *weights)
    return [name for name, tensor in held if tensor is not None and _is_coded(tensor)]


def _is_coded(tensor: Tensor) -> bool:
    stated = getattr(tensor, "quant_state", None) is not None or _is_rounded_late(tensor)
    return stated or tensor.dtype in _NARROW or quantisers.is_of_quantiser(tensor)


def _is_rounded_late(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and bool(getattr(tensor, _ROUNDS, False)) and tensor.is_floating_point()


def _rounded(weight: Tensor) -> dict[str, Tensor]:
    """Return what bitsandbytes rounds a weight to before it multiplies."""
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.detach().to(torch.float16))
    return {"weight": codes, bitsandbytes8.MARKS[0]: scales}


class WeightReader:
    """Stands for the weight of one quantised layer, as the layer is now. Nothing is read before an operator needs it.

    Args:
        module: the layer.
        shape: the weight's shape, [out, in].
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        rows, columns = shape
        self._codes = _Present("", rows, columns, weakref.ref(module))
        self._read: Coded | None = None

    def __call__(self, module: nn.Module, dtype: torch.dtype) -> Coded:
        """Return the weight [out, in] in this dtype. Each operator that reads it dequantises it."""
        device = _held(module).device
        if self._read is None or self._read.dtype != dtype or self._read.device != device:
            self._read = Coded(self._codes, dtype, device=device)
        return self._read


@dataclasses.dataclass(frozen=True)
class _Present(Codes):
    """The codes that a layer has at each reading. They are read again when the layer's tensor has changed.

    Attributes:
        module: the layer, which is freed without this object.
        kept: by what they were read from, the codes that were read last, with the tensor.
    """

    module: weakref.ref[nn.Module] = dataclasses.field(repr=False, compare=False)
    kept: dict[object, tuple[Tensor, Codes]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def dequantise(self) -> Tensor:
        module = self.module()
        assert module is not None
        own = _held(module)
        now = id(own), own.device, is_repacked(module)
        found = self.kept.get(now)
        if found is None:
            codes = codes_in(module, type(module).__name__, {})
            assert codes is not None
            self.kept.clear()
            self.kept[now] = found = own, codes
        return found[1].dequantise()


def _held(module: nn.Module) -> Tensor:
    """Return the first tensor of a quantised layer."""
    held = (module._parameters.get("weight"), *module._buffers.values())
    return next(tensor for tensor in held if tensor is not None)
