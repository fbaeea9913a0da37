"""The comparison of a method with HF PEFT's of the same type, on random adapters: forward, gradients, files both ways.

The oracle is `peft`'s own forward. The adapted modules are those that both the method and `peft` can adapt: linear
layers with and without a bias, stored both ways, convs and embeddings.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.contract.method import Method
from peftfx.contract.weight import WeightMethod
from peftfx.errors import first_line
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import load, transform
from peftfx.testing.blocks import Conv, DenseBlock, Mlp
from peftfx.testing.extras import needed
from peftfx.testing.models import Image, Spec, Text
from peftfx.testing.setup import assert_close, stir

_TOLERANCE = 2e-5  #: the largest error, relative to the largest value
_MODELS: tuple[Spec, ...] = (
    Text((DenseBlock(outer=12), DenseBlock(bias=False, inner=12), Mlp())),
    Text((DenseBlock(transposed=True, outer=12), DenseBlock(transposed=True, inner=12))),
    Image((Conv(), Conv(stride=2))),
)
_TYPES: Mapping[str, tuple[type[nn.Module], ...]] = {"linear": (nn.Linear,), "conv": (nn.Conv2d,)}
_SIZES = ((3, 5), (1, 4))


def config_class(cls: type[Method]) -> Any:
    """Return HF PEFT's config class for the type of a weight method, or None."""
    mapping = needed("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    return next(
        (c for kind, c in mapping.items() if kind.value == cls.peft_type and issubclass(cls, WeightMethod)), None
    )


def compare(cls: type[Method], options: Mapping[str, object], *, gradients: bool = True) -> None:
    """Compare a method with HF PEFT's, with these options, on each model that both can adapt."""
    tried = [spec for spec in _MODELS if _compare_on(cls, options, spec, gradients=gradients)]
    assert tried, "HF PEFT adapts none of the models"


def _compare_on(cls: type[Method], options: Mapping[str, object], spec: Spec, *, gradients: bool) -> bool:
    """Compare on one model, raising for a difference; return whether HF PEFT adapts the model at all."""
    peft, base = needed("peft"), spec.build()
    targets = _targets(cls, base)
    if not targets:
        return False
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = peft.get_peft_model(copy.deepcopy(base), config_class(cls)(target_modules=targets, **options))
        except (ValueError, NotImplementedError, TypeError) as error:
            if spec is _MODELS[0]:
                raise AssertionError(f"peft refuses these options: {first_line(error)}") from error
            return False
        if not any(p.requires_grad for p in theirs.parameters()):
            return False  # peft silently skips these modules
        _stir(theirs)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = load(copy.deepcopy(base), Path(folder), inputs=spec.inputs(2, 3))
            caller = theirs.eval().base_model if ours.adapter("default").rules[0].inputs else theirs.eval()
            _same_forward(ours, caller, spec, "loaded from peft")
            if gradients:
                for model in (ours, caller):
                    model(**spec.inputs(3, 5, 4), **_beside(ours, 3)).square().sum().backward()
                same_gradients(ours.adapter("default"), caller)
        with tempfile.TemporaryDirectory() as folder:
            made = transform(
                copy.deepcopy(base),
                cls.from_options({"target_modules": targets, **options}),
                seed=3,
                inputs=spec.inputs(2, 3),
            )
            stir(made.adapter("default"), 1)
            made.save_pretrained(folder)
            read = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
            read = read.base_model if made.adapter("default").rules[0].inputs else read  # its forward takes task_ids
            _same_forward(made, read, spec, "loaded by peft")
    return True


def _targets(cls: type[Method], base: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    types = tuple(t for kind in sorted(cls.kinds) for t in _TYPES.get(kind, ()))
    types += (Conv1D,) if "linear" in cls.kinds else ()
    return [path for path, module in base.named_modules() if isinstance(module, types) and path != "head"]


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    rng = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng).to(parameter.dtype))


@torch.no_grad()
def _same_forward(ours: AdaptedModel, theirs: nn.Module, spec: Spec, what: str) -> None:
    for seed, (batch, sequence) in enumerate(_SIZES):
        inputs = spec.inputs(batch, sequence, seed) | _beside(ours, batch)
        assert_close(ours.eval()(**inputs), theirs(**inputs), _TOLERANCE, what)
        with ours.disable_adapter():
            assert not torch.allclose(ours(**inputs), theirs(**inputs), atol=1e-4), "the adapter changes nothing"


def same_gradients(adapter: Adapter, theirs: nn.Module) -> None:
    """Compare the gradients of each tensor that both models train, found by its key in a loaded file.

    Args:
        adapter: the adapter that peftfx loaded, with gradients.
        theirs: HF PEFT's model, with gradients.

    Raises:
        AssertionError: the gradients differ, or the two train different tensors.
    """
    named = theirs.named_parameters(remove_duplicate=False)
    trained = {_plain(n).removeprefix("model."): p for n, p in named if p.requires_grad}
    own = {_plain(n): adapter.get(key) for n, key in adapter.accounts[0].taken.items()}
    own = {name: t for name, t in own.items() if isinstance(t, nn.Parameter)}
    found, all_of = ({id(t) for t in ts} for ts in ([trained.get(n) for n in own], trained.values()))
    assert found == all_of, f"peft trains others: {sorted(own.keys() ^ trained.keys())[:4]}"
    for name, mine in own.items():
        got, want = mine.grad, trained[name].grad
        assert isinstance(got, Tensor), f"{name} gets no gradient"
        if want is None:  # peft's code passes over it, as FRoD's does over a sparse part without entries
            assert not bool(got.any()), f"{name} gets a gradient, and none in peft"
            continue
        assert_close(got, want, 10 * _TOLERANCE, f"the gradient of {name}")


def _beside(ours: AdaptedModel, batch: int) -> dict[str, Tensor]:
    """Return the inputs that the method reads besides the model's own, for `batch` rows."""
    (method,) = ours.adapter("default").rules
    return {name: torch.arange(batch) % count for name, count in method.inputs.items()}


def _plain(name: str) -> str:
    """Return a tensor's name without the prefixes and suffixes of files and of `peft`'s modules."""
    return name.replace(".default", "").removeprefix("base_model.").removesuffix(".weight")
