"""Recurrences: loops over the tokens of a linear attention or a state space, as one operator for every length.

A model's code runs such a loop in chunks of tokens, and a capture would record as many chunks as its example has.
transformers asks for kernels by name here, and each name has one meaning in all models. So during a capture these names
stand for one operator, `peftfx::recurrence`.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfx.graph.capturing.loops.recurrence_operator import recurrence
from peftfx.graph.capturing.loops.recurrent_layers import recurrent_layers


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """Compute flash-linear-attention's `chunk_gated_delta_rule` (g [batch, tokens, heads]) or `chunk_kda`.

    g is the logarithm of the decays: [batch, tokens, heads, keys] for `chunk_kda`. Each head of query and key serves
    the same number of value heads.
    """
    dtype, heads, width = query.dtype, value.shape[2], key.shape[-1]
    if key.shape[2] != heads:
        query, key = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    query, key, value, g, beta = (x.float() for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    decay = (g if g.ndim == 4 else g[..., None]).exp()
    if initial_state is None:
        initial_state = value.new_zeros(value.shape[0], heads, width, value.shape[-1])
    out, state = recurrence(query * width**-0.5, key, value, decay, beta, initial_state.float(), True)
    return out.to(dtype), state if output_final_state else None


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `selective_scan_fn` of mamba_ssm.

    hidden_states, dt and z are [batch, channels, tokens], A is [channels, states], B and C are [batch, states, tokens].
    The state stays in float32 in every dtype, as in the kernel.
    """
    dtype = hidden_states.dtype
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    dt = (F.softplus(dt) if delta_softplus else dt).transpose(1, 2)
    key, query = (x.transpose(1, 2)[:, :, None].float() for x in (B, C))
    value = (dt * hidden_states.transpose(1, 2)).float()[..., None]
    decay = torch.exp(A * dt[..., None]).float()
    tokens, read_before = hidden_states.shape[-1], _take_state((hidden_states.shape[1], key.shape[-1]))
    if read_before is None:
        state = value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], 1)
    else:  # which the code goes on from with a single token alone
        state = torch.where(_is_single(tokens, value), read_before.float(), 0.0)[..., None]
    read, state = recurrence(query, key, value, decay, torch.ones_like(value[..., 0]), state, False)
    out = read[..., 0].transpose(1, 2).to(dtype)
    out = out if D is None else out + hidden_states * D[None, :, None]
    out = out if z is None else out * F.silu(z)
    return (out, state[..., 0]) if return_last_state else out


def _channel_scan(
    _: nn.Module,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute `_rnn_scan` of a linear recurrent unit: each channel of [batch, tokens, channels] has a state."""
    value = hidden_states.to(acc_dtype)[..., None]
    ones = torch.ones_like(value)
    decay = (recurrent_gate * ~reset).to(acc_dtype)[..., None]
    state = torch.zeros_like(value[:, 0]) if recurrent_states is None else recurrent_states.to(acc_dtype)[..., None]
    out, last = recurrence(ones, ones, value, decay, ones[..., 0], state[..., None], False)
    return out[..., 0].to(hidden_states.dtype), last[..., 0, 0]


def _chunk_scan(
    own: Callable[..., object],
    hidden_states: Tensor,
    dt: Tensor,
    *args: object,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    **options: object,
) -> object:
    """Compute `mamba_chunk_scan_combined` of mamba_ssm, also for a single token that continues a text.

    For a single token the model's code calls `selective_state_update`, which has no limits for dt,
    [batch, tokens, heads].
    """
    if initial_states is not None and tuple(dt_limit) != (0.0, math.inf):
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = F.softplus(dt) if dt_softplus else dt
        goes_on = _is_single(dt.shape[1], dt) & (initial_states != 0).any()  # ahead of the first token all is zero
        dt = torch.where(goes_on, dt, torch.clamp(dt, *dt_limit))
        dt_bias, dt_softplus, dt_limit = None, False, (-math.inf, math.inf)
    given = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "initial_states": initial_states}
    return own(hidden_states, dt, *args, **given, **options)


def _is_single(tokens: int, like: Tensor) -> Tensor:
    """Return whether there is one token, as a bool[] tensor, so that a capture does not branch on it."""
    return torch.arange(tokens, device=like.device)[-1] == 0


class _Read(threading.local):
    """The recurrent state that a model's code last read from its cache during a capture, for each thread."""

    listening = False
    state: Tensor | None = None
    taken = 0  #: how many heads' states have been taken


_READ = _Read()


def note_state(state: Tensor | None) -> None:
    """Record a recurrent state that a model's code reads, for kernels that do not take the state as an argument."""
    _READ.state, _READ.taken = (state if _READ.listening else None), 0


def _take_state(shape: tuple[int, int]) -> Tensor | None:
    """Return the state of each row, in this shape, that was recorded last, and drop the record.

    If it is of several heads, [batch, heads, *shape], the code scans head by head: each scan takes the next head's.
    """
    state, place = _READ.state, _READ.taken
    if state is None or state.ndim != 4 or tuple(state.shape[2:]) != shape:
        _READ.state = None
        return state
    _READ.taken += 1
    if _READ.taken == state.shape[1]:
        _READ.state = None
    return state[:, place]


#: Replacements that also get the original kernel of the model's code, as their first argument.
_WRAPPED: Mapping[str, Callable[..., object]] = {"mamba_chunk_scan_combined": _chunk_scan}
_KERNELS: Mapping[str, Callable[..., object]] = {
    "chunk_gated_delta_rule": _delta_rule,
    "chunk_kda": _delta_rule,
    "selective_scan_fn": _selective_scan,
}
#: Methods of modules that are kernels, by their names.
_METHODS: Mapping[str, Callable[..., object]] = {"_rnn_scan": _channel_scan}


@contextmanager
def recurrences(model: nn.Module) -> Iterator[None]:
    """Replace the kernels and methods of these names in the code of `model` by recurrences, inside the context.

    torch's recurrent layers are operators there, too.
    """
    replaced: list[tuple[dict[str, Any], str, object]] = []
    methods: list[tuple[type, str, object]] = []
    _READ.listening, _READ.state = True, None
    try:
        kinds = {kind for module in model.modules() for kind in type(module).__mro__}
        for kind in kinds:
            for name, scan in _METHODS.items():
                if _takes(vars(kind).get(name), scan):
                    methods.append((kind, name, vars(kind)[name]))
                    setattr(kind, name, scan)
        for name in sorted({kind.__module__ for kind in kinds}):
            namespace = vars(sys.modules[name]) if name.startswith("transformers.models.") else {}
            for attribute, function in list(namespace.items()):
                kernel = _KERNELS.get(asked := _kernel_of(function))
                if kernel is None and asked in _WRAPPED:
                    kernel = functools.partial(_WRAPPED[asked], function)
                if kernel is not None:
                    replaced.append((namespace, attribute, function))
                    namespace[attribute] = kernel
        with recurrent_layers():
            yield
    finally:
        _READ.listening, _READ.state = False, None
        for namespace, attribute, function in replaced:
            namespace[attribute] = function
        for kind, name, method in methods:
            setattr(kind, name, method)


def _takes(method: object, kernel: Callable[..., object]) -> bool:
    """Return whether a method has the arguments of a kernel, by name."""
    if not inspect.isfunction(method):
        return False
    return [*inspect.signature(method).parameters][1:] == [*inspect.signature(kernel).parameters][1:]


def _kernel_of(function: object) -> str:
    """Return the name by which transformers asks for the kernel that a function replaces; empty for others.

    Where the package `kernels` is installed, the function is a module, and the module's class has the name.
    """
    if isinstance(function, nn.Module):
        name = getattr(type(function), "kernel_layer_name", None)
    elif inspect.isfunction(function) and hasattr(function, "__wrapped__"):
        name = inspect.getclosurevars(function).nonlocals.get("func_name")
    else:
        name = None
    return name if isinstance(name, str) else ""
