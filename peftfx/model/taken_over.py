"""Take over the adapters of a HF PEFT model: from the files that PEFT makes, and from what its layers say."""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.files.reader import read_adapter
from peftfx.adapters.files.swap import fill
from peftfx.adapters.files.writer import config_and_tensors
from peftfx.bases.peft_models.layers import active_adapters, scales
from peftfx.bases.peft_models.saved import Taken, save_peft_adapters
from peftfx.errors import PeftfxError, PeftfxWarning, warn
from peftfx.model.adapted import AdaptedModel
from peftfx.rules.peft_files import CONFIG
from peftfx.twins.repacked import unpack_all

_PATTERN = "alpha_pattern"
_NUMERATORS = ("lora_alpha", "alpha")


def taken_over(model: nn.Module, adapt: Callable[[], AdaptedModel]) -> AdaptedModel:
    """Return an adapted model with the base and the adapters of a HF PEFT model.

    Args:
        model: a `peft.PeftModel`. It keeps all that it has; the base's tensors are shared.
        adapt: makes the adapted model of its base, without adapters.

    Raises:
        PeftfxError: PEFT cannot write an adapter, it acts in some of its layers alone, or a layer has a scale that no
            config says.
    """
    unpack_all(dict(model.named_modules()))  # for peft calls state_dict, in which bitsandbytes spoils repacked layers
    active = active_adapters(model)
    with tempfile.TemporaryDirectory(prefix="peftfx-taken-over-") as folder:
        taken = save_peft_adapters(model, Path(folder))
        adapted = adapt()
        for name, own in taken.items():
            with _named(name, own.folder):
                _load(adapted, name, own, scales(model, name))
    adapted.set_adapter(active)
    for name, own in taken.items():
        if own.frozen:
            _freeze(adapted, name, own.frozen)
    adapted.shares_with(model)
    return adapted


@contextmanager
def _named(name: str, folder: Path) -> Iterator[None]:
    """Let errors about an adapter name it, and not the folder to which it is written for a moment."""
    try:
        yield
    except PeftfxError as error:
        told = (text.replace(str(folder), f"adapter {name!r}") for text in (error.what, error.where, error.hint))
        raise type(error)(*told) from error.__cause__


def _load(adapted: AdaptedModel, name: str, own: Taken, layers: Mapping[str, float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same are told below
        read = read_adapter(own.folder, adapted.source, adapted.sites)
    if _other_scales(read, layers):
        _write_scales(own.folder / CONFIG, read, layers)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted.load_adapter(own.folder, name)
    for warning in told:
        if issubclass(warning.category, PeftfxWarning):
            warn(str(warning.message).replace(str(own.folder), f"adapter {name!r}"))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    adapter = adapted.adapter(name)
    if other := _other_scales(adapter, layers):
        path, scale = next(iter(other.items()))
        what = f"a layer of adapter {name!r} has the scale {layers[path]:g}, and by its config it would have {scale:g}"
        raise PeftfxError(what, path, "give the layer its own scale again: set_scale(NAME, 1) of the PEFT layer")
    adapter.start = own.start
    if own.whole is not None:
        fill(adapter, read_adapter(own.whole, adapted.source, adapted.sites))


def _other_scales(adapter: Adapter, layers: Mapping[str, float]) -> dict[str, float]:
    """Return the scales of an adapter that are not those of PEFT's layers, by path."""
    found = {}
    for placement in adapter.placements:
        scale, own = getattr(placement.method, "scaling", None), layers.get(placement.site.path)
        if own is not None and scale is not None and not math.isclose(scale, own, rel_tol=1e-6):
            found[placement.site.path] = scale
    return found


def _write_scales(file: Path, adapter: Adapter, layers: Mapping[str, float]) -> None:
    """Write the scales of PEFT's layers into a config, as numerators by path, if it has such a pattern.

    `set_scale` and the like change a layer, and PEFT saves nothing of it.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    numerator = next((field for field in _NUMERATORS if field in config), None)
    if numerator is None or not isinstance(config.get(_PATTERN), dict):
        return
    own = {}
    for placement in adapter.placements:
        path, method = placement.site.path, vars(placement.method)
        if path in layers and (scale := getattr(placement.method, "scaling", None)):
            own[re.escape(path)] = method[numerator] * layers[path] / scale
    file.write_text(json.dumps(config | {_PATTERN: {**own, **config[_PATTERN]}}), encoding="utf-8")


def _freeze(adapted: AdaptedModel, name: str, frozen: Sequence[str]) -> None:
    """Freeze the tensors of an adapter that its HF PEFT model does not train: see `Taken.frozen`."""
    parameters = {p.data_ptr(): p for p in adapted.adapter(name).parameters()}
    with adapted.plain():
        _, tensors = config_and_tensors(adapted.source, adapted.adapter(name))
    for key, tensor in tensors.items():
        own = key.removesuffix(".weight")
        if own in frozen and tensor.data_ptr() in parameters:
            parameters[tensor.data_ptr()].requires_grad_(False)
