"""Say what a model's files hold, under transformers' names. Tensors are computed only when they are written."""

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
    """The contents of a model's files.

    Attributes:
        tensors: the tensors, by their names in the files.
        roundings: what merged weights lost to the dtype that they were written in, by their names in the model. It has
            the weights that have been written so far.
    """

    tensors: dict[str, Content]
    roundings: dict[str, Rounding]


def contents_of(
    model: PreTrainedModel,
    dtype: Callable[[str], torch.dtype],
    packings: Mapping[str, Packing] = MappingProxyType({}),
) -> CheckpointContents:
    """Return the tensors of a model in the order and under the names of its files.

    A tensor that several modules share is written once, if the model ties it when it is loaded. If the embeddings and
    the head are no longer tied, the config says so. Tensors that transformers joins when it loads (such as experts) are
    split again.

    Args:
        model: the model. Its parameters may be `Deferred`, or stay in their files.
        dtype: gives the dtype that a floating tensor is written in, by its name in the model.
        packings: how the weights of layers are rounded, by the layers' paths. Their weights must be among
            `plain_names`.
    """
    roundings: dict[str, Rounding] = {}
    packed = {f"{path}.weight": packing for path, packing in packings.items()}
    late = {
        name: _deferred(name, tensor, torch.float32 if name in packed else dtype(name), roundings)
        for name, tensor in written_tensors(model).items()
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
    """Return the names of tensors that the files hold unchanged, perhaps under another name."""
    late = {name: _deferred(name, tensor, torch.float32, {}) for name, tensor in written_tensors(model).items()}
    found = {id(tensor) for tensor in _as_in_files(model, late).values()}
    return frozenset(name for name, tensor in late.items() if id(tensor) in found)


def written_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model's state that are written, by their names in the state."""
    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in _ignored(model)}
    _untie(model, own)
    tied = _tied(model, own)
    return {name: t for name, t in own.items() if name not in tied}


def refuse_unlike(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Refuse merge results that a config cannot describe: new biases, and weights of other shapes.

    Raises:
        PeftfxError: the merged model has such a tensor.
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
    """Return the names of tensors that loading ties to another written tensor, by the config as it is now."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    return [name for name, source in pairs.items() if name in own and source in own and own[name] is own[source]]


def _untie(model: PreTrainedModel, own: Mapping[str, Tensor]) -> None:
    """Say in the config that tensors which the config ties are no longer equal."""
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
    return found
