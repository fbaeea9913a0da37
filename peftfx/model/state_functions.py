"""HF PEFT's functions that read an adapter's state, or put another in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from peftfx.adapters.files.swap import swap_file, swap_state
from peftfx.adapters.files.writer import refuse_save_arguments, state_of
from peftfx.model.adapted import AdaptedModel
from peftfx.model.by_name import refuse_left_out_sizes


def get_peft_model_state_dict(
    model: AdaptedModel,
    adapter_name: str = "default",
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors by HF PEFT's names, as `peft.get_peft_model_state_dict` does.

    Args:
        model: the adapted model.
        adapter_name: the adapter's name.
        state_dict: this model's own state, as `Accelerator.get_state_dict` returns it; another state is refused.
        save_embedding_layers: whether the base's embeddings are returned, too. By default they are, as in HF PEFT, if
            the base was resized after it was loaded.

    Raises:
        PeftfxError: there is no such adapter, or an argument asks for tensors that it cannot return.

    Examples:
        >>> sorted(peftfx.get_peft_model_state_dict(adapted))[0]
        'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    other = state_dict is not None and not model.is_own(state_dict)
    refuse_save_arguments(True, other, save_embedding_layers, None, False)
    with model.plain():
        return state_of(model.source, model.adapter(adapter_name), save_embedding_layers, "get_peft_model_state_dict")


def set_peft_model_state_dict(
    model: AdaptedModel,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Copy the tensors of a state, by HF PEFT's names, into an adapter.

    Args:
        model: the adapted model.
        peft_model_state_dict: tensors by their names in HF PEFT's file, as `get_peft_model_state_dict` gives them.
        adapter_name: the name of the adapter that gets the tensors.
        ignore_mismatched_sizes: refused: all tensors of the state are taken.
        low_cpu_mem_usage: ignored: no memory is taken twice.

    Returns:
        The lists `missing_keys` and `unexpected_keys`, both empty: a state that does not fit is an error.

    Raises:
        PeftfxError: the state does not fit this adapter: keys are missing, unexpected or of another shape.

    Examples:
        >>> state = peftfx.get_peft_model_state_dict(adapted)
        >>> keys = peftfx.set_peft_model_state_dict(adapted, {name: 2 * tensor for name, tensor in state.items()})
    """
    model.named.apart("an adapter gets other values")
    refuse_left_out_sizes(ignore_mismatched_sizes)
    swap_state(model.source, model.sites, model.adapter(adapter_name), peft_model_state_dict)
    return _IncompatibleKeys([], [])


def hotswap_adapter(model: AdaptedModel, path: str | Path, adapter_name: str = "default") -> None:
    """Put the adapter of a HF PEFT directory in the place of an adapter of the model, as active as that one is.

    If ranks and scales are the same, tensors are copied, and a compiled model is not compiled again. An adapter of
    other ranks or scales, or at fewer places, brings its own tensors: give an optimizer the new parameters.

    Args:
        model: the adapted model.
        path: a HF PEFT directory of an adapter at the same places, or fewer, with the same options but for `r`,
            `lora_alpha` and their patterns.
        adapter_name: the name of the adapter that is replaced; its name stays.

    Raises:
        PeftfxError: the two adapters differ in more, or the file does not fit this model.

    Examples:
        >>> peftfx.hotswap_adapter(adapted, "adapter")
    """
    model.named.apart("an adapter gets other values")
    adapter = model.adapter(adapter_name)
    new = swap_file(model.source, model.sites, adapter, Path(path))
    if new is not adapter:
        model.exchange(adapter_name, new)
