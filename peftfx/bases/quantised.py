"""Quantised bases: transformers' model without its quantiser, over the codes in its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftfx.bases.tasks import maker_of
from peftfx.bases.transformers_config import read_config, without_initial_values
from peftfx.errors import PeftfxError
from peftfx.graph.lazy_weights import exact
from peftfx.options import BASE_QUANTIZATIONS, check_choice
from peftfx.quantisation.checkpoint import read_checkpoint
from peftfx.quantisation.coded import Coded
from peftfx.quantisation.rounding import tabled

QUANTISED = "quantization_config"


def load_quantised(
    directory: Path,
    files: Sequence[Path],
    *,
    task: str | None,
    changes: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Load a model whose quantised weights stay in their files (`Coded`), with transformers' loading info.

    Args:
        directory: a directory in transformers' layout, whose config has a `quantization_config`.
        files: the files of the weights. Without files, the parameters stay uninitialised.
        task: the task, which decides the head; by default the class named in the config.
        changes: fields of the config that have other values, such as `num_labels`.
        dtype: the dtype that weights are computed in; by default float32.

    Raises:
        PeftfxError: the format is not supported, or the stored tensors do not fit the model.
    """
    config = read_config(directory, **changes)
    said = config.quantization_config
    del config.quantization_config
    maker = maker_of(config, task, directory)
    wanted = dtype or torch.float32
    if not files:
        return outline(maker, config, wanted), {"missing_keys": (), "mismatched_keys": ()}
    said = said if isinstance(said, dict) else said.to_dict()
    tensors = read_checkpoint(files, said, directory, wanted)
    return filled_model(maker, config, _turned(tensors, maker, config), wanted)


def _turned(tensors: dict[str, Tensor], maker: Any, config: object) -> dict[str, Tensor]:
    """Return the tensors, with the weights of `Conv1D` layers as these layers hold them, [in, out].

    Files have the codes of every layer as those of a linear one, [out, in].
    """
    with torch.device("meta"):
        model = blank(maker, config, torch.float32)
    turned = [f".{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)]
    if not turned:
        return tensors

    def fits(name: str) -> bool:  # a file may leave out the prefix of the model's names, or have one more
        return any(own.endswith(f".{name}") or f".{name}".endswith(own) for own in turned)

    return {name: t.moved(torch.t) if isinstance(t, Coded) and fits(name) else t for name, t in tensors.items()}


def filled_model(maker: Any, config: object, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Make a model of these tensors, by their checkpoint names. Return it with transformers' loading info.

    Raises:
        PeftfxError: the model lacks one of the quantised weights.
    """
    coded = {id(t.codes): name for name, t in tensors.items() if isinstance(t, Coded)}
    model, info = maker.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=dtype,
    )
    held = {id(p.codes) for p in model.parameters() if isinstance(p, Coded)}
    wrong = {name for name, *_ in info["mismatched_keys"]}
    lost = [name for key, name in coded.items() if key not in held and name not in wrong]
    if lost:
        what = f"{len(lost)} quantised weights belong to no layer of a {type(model).__name__}"
        hint = "name the base's task; quantised weights that transformers joins while loading are not supported"
        raise PeftfxError(what, ", ".join(lost[:3]), hint)
    return model.eval(), info


def quantise(model: nn.Module, table: str) -> None:
    """Quantise a floating-point base as `load_in_4bit` would, leaving out the same modules.

    Nothing is computed yet: each weight stays where it is, and its codes are computed whenever they are needed.

    Args:
        model: a transformers model. The weights of its linear layers are replaced.
        table: the kind of codes: `nf4`.

    Raises:
        PeftfxError: the table is unknown, or the base is quantised already.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    check_choice(table, BASE_QUANTIZATIONS, "quantize_base", "unknown quantisation of a base:")
    if any(isinstance(p, Coded) for p in model.parameters()):
        raise PeftfxError("the base is quantised already", "quantize_base", "leave quantize_base out")
    apart = set(get_keys_to_not_convert(model)) if hasattr(model, "config") else set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or any(f"{path}.".startswith(f"{key}.") for key in apart):
            continue
        weight, turned = module.weight, isinstance(module, Conv1D)
        stored = exact(weight.detach())
        views = (torch.t,) if turned else ()
        coded = Coded(tabled(stored.T if turned else stored, table), weight.dtype, views=views)
        module._parameters["weight"] = nn.Parameter(coded, requires_grad=False)


def blank(maker: Any, config: object, dtype: torch.dtype) -> nn.Module:
    """Make a model with uninitialised parameters."""
    with without_initial_values():
        made = maker._from_config(config, dtype=dtype)
    assert isinstance(made, nn.Module)
    return made


def outline(maker: Any, config: object, dtype: torch.dtype) -> nn.Module:
    """Make a model with uninitialised parameters, of which those are one that are one in a loaded model."""
    made = blank(maker, config, dtype)
    made.tie_weights()  # type: ignore[operator]
    return made
