"""contents_of: what the files of a model hold, by the names that transformers has for it, made when it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftfx.adapters.deferred import Deferred
from peftfx.adapters.recipes import Rounding
from peftfx.errors import PeftfxError
from peftfx.export.checkpoint.packing import Packing
from peftfx.export.checkpoint.shards import Content
from peftfx.graph.lazy_weights import exact


@dataclass(frozen=True)
class CheckpointContents:
    """What the files of a model hold.

    Attributes:
        tensors: by their names there.
        roundings: what merged weights, by their names in the model, lost to the dtype that they were written in; of
            those that have been.
    """

    tensors: dict[str, Content]
    roundings: dict[str, Rounding]


def contents_of(
    model: PreTrainedModel,
    dtype: Callable[[str], torch.dtype],
    packings: Mapping[str, Packing] = MappingProxyType({}),
) -> CheckpointContents:
    """The tensors of a model in the order and under the names of its files.

    A tensor that several modules share is written once, if the model ties them when it is loaded; the config says of a
    model whose words and head are not one any more that they are two. What transformers puts together when it loads
    (experts) is taken apart again.

    Args:
        model: its parameters may be `Deferred`, or stay in their files.
        dtype: what each floating tensor is written in, by its name in the model.
        packings: of layers whose weights are rounded, by their paths; they are `plain_names`.
    """
    roundings: dict[str, Rounding] = {}
    packed = {f"{path}.weight": packing for path, packing in packings.items()}
    late = {
        name: _deferred(name, tensor, torch.float32 if name in packed else dtype(name), roundings)
        for name, tensor in _written(model).items()
    }
    own = {id(tensor): name for name, tensor in late.items()}
    found: dict[str, Deferred] = {}
    for name, tensor in _as_in_files(model, late).items():
        packing = packed.get(own.get(id(tensor), ""))
        if packing is None:
            found[name] = tensor
        else:
            found |= {name.removesuffix("weight") + what: made for what, made in packing.tensors(tensor).items()}
    return CheckpointContents({name: Content(tuple(t.shape), t.dtype, t.value) for name, t in found.items()}, roundings)


def plain_names(model: PreTrainedModel) -> frozenset[str]:
    """The names of tensors that are in the files as they are in the model, by whatever name."""
    late = {name: _deferred(name, tensor, torch.float32, {}) for name, tensor in _written(model).items()}
    found = {id(tensor) for tensor in _as_in_files(model, late).values()}
    return frozenset(name for name, tensor in late.items() if id(tensor) in found)


def _written(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is written of a model's state, by its names there."""
    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in _ignored(model)}
    _untie(model, own)
    tied = _tied(model, own)
    return {name: t for name, t in own.items() if name not in tied}


def refuse_unlike(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Refuse what a merge made that a config cannot say: new biases, and weights of other shapes.

    Raises:
        PeftfxError: there is such a tensor.
    """
    hint = "export it to ONNX: a graph can hold it"
    new = [name for name in after if name not in before]
    if new:
        raise PeftfxError("the merged model has tensors that its architecture has no place for", new[0], hint)
    for name, tensor in after.items():
        if tensor.shape != before[name].shape:
            what = f"the merged weight is {list(tensor.shape)}, and the architecture's {list(before[name].shape)}"
            raise PeftfxError(what, name, hint)


def _ignored(model: PreTrainedModel) -> frozenset[str]:
    return frozenset(model._keys_to_ignore_on_save or ())


def _tied(model: PreTrainedModel, own: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that loading makes one with another that is written."""
    pairs = model.all_tied_weights_keys
    return [name for name, source in pairs.items() if name in own and source in own and own[name] is own[source]]


def _untie(model: PreTrainedModel, own: Mapping[str, Tensor]) -> None:
    """Say in the config where tensors that it ties are two."""
    pairs = model.all_tied_weights_keys
    if any(name in own and source in own and own[name] is not own[source] for name, source in pairs.items()):
        for module in model.modules():
            if hasattr(config := getattr(module, "config", None), "tie_word_embeddings"):
                config.tie_word_embeddings = False  # type: ignore[union-attr]


def _deferred(name: str, tensor: Tensor, dtype: torch.dtype, roundings: dict[str, Rounding]) -> Deferred:
    kept = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
    like = torch.empty(kept.shape, dtype=dtype if kept.is_floating_point() else kept.dtype, device="meta")

    def make() -> list[Tensor]:
        value = kept.value() if isinstance(kept, Deferred) else exact(kept)
        new = value.to(like.dtype)
        if isinstance(kept, Deferred) and new.dtype != value.dtype:
            roundings[name] = Rounding.of(new, value)
        return [new]

    return Deferred.of(make, [like])[0]


def _as_in_files(model: PreTrainedModel, tensors: dict[str, Deferred]) -> dict[str, Deferred]:
    from transformers.core_model_loading import revert_weight_conversion

    found = revert_weight_conversion(model, tensors)  # type: ignore[arg-type]
    assert all(isinstance(t, Deferred) for t in found.values())
    return found  # type: ignore[return-value]
