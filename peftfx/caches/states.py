"""Cache layers with states of fixed size: the last inputs of convolutions, and the states of recurrences.

transformers' own layers write into the memory of their states, so that a compiled model finds them at a fixed address.
These layers replace the state's tensor by a new tensor: a graph has the old one as an input and the new one as an
output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from peftfx.graph.capturing.loops.recurrences import note_state

CONV_STATE, RECURRENT_STATE = "conv_state", "recurrent_state"


class StateLayer(LinearAttentionCacheLayerMixin):
    """A cache layer of convolutions and recurrences.

    Each state is a separate attribute, so that a comparison of attributes shows which states a call changed.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, number_of_states: int = 1) -> None:
        self.number_of_states = number_of_states
        self.record_past = False
        self.states: tuple[str, ...] = tuple(
            name if not i else f"{name}_{i}" for i in range(number_of_states) for name in (CONV_STATE, RECURRENT_STATE)
        )
        for name in self.states:
            setattr(self, name, None)
        for i in range(number_of_states):
            setattr(self, f"started_{i}", False)

    def give(self, name: str, state: Tensor) -> None:
        """Set a state, from which the layer continues."""
        setattr(self, name, state)
        setattr(self, f"started_{self.states.index(name) // 2}", True)

    def _all(self, name: str) -> dict[int, Tensor | None]:
        return {i: getattr(self, _numbered(name, i)) for i in range(self.number_of_states)}

    @property
    def conv_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """The state of each convolution, [batch, channels, kernel]."""
        return self._all(CONV_STATE)

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """The state of each recurrence."""
        found = self._all(RECURRENT_STATE)
        note_state(found[0] if self.number_of_states == 1 else None)
        return found

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether there was an earlier call, for each index of a state."""
        return {i: getattr(self, f"started_{i}") for i in range(self.number_of_states)}

    @property
    def is_conv_states_initialized(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether each convolution has a state."""
        return {i: state is not None for i, state in self.conv_states.items()}

    @property
    def is_recurrent_states_initialized(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether each recurrence has a state."""
        return {i: state is not None for i, state in self._all(RECURRENT_STATE).items()}

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Do nothing: a state exists from its first write."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: object
    ) -> Tensor:
        """Return the state followed by the new input, [batch, channels, ...], and keep its end."""
        name = _numbered(CONV_STATE, state_idx)
        before = getattr(self, name)
        if before is not None and getattr(self, f"started_{state_idx}"):
            size, full = before.shape[-1], torch.cat([before, conv_states], dim=-1)
            kept = full[..., -size:].to(before.dtype)
        else:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            short = size - conv_states.shape[-1]
            full = torch.nn.functional.pad(conv_states, (short, 0)) if short > 0 else conv_states
            kept = full[..., -size:]
        setattr(self, f"started_{state_idx}", True)
        setattr(self, name, kept)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: object) -> Tensor:
        """Keep the new state, in the dtype of the old state."""
        name = _numbered(RECURRENT_STATE, state_idx)
        before = getattr(self, name)
        kept = recurrent_states if before is None else recurrent_states.to(before.dtype)
        setattr(self, name, kept)
        return kept

    def increase_count(self, state_idx: int) -> None:
        """Do nothing: the tokens are counted where there are keys, see `StateCache`."""

    def reset(self) -> None:
        """Drop all states."""
        self.__init__(self.number_of_states)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens from a state."""
        raise RuntimeError("tokens cannot be removed from a recurrent state")

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.states:
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, change(state))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the rows of these indices."""
        self._each(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._each(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select the rows of these indices."""
        self._each(lambda state: state[indices])


class StateAndAttentionLayer(StateLayer, DynamicLayer):  # type: ignore[misc]
    """A cache layer with states, and with keys and values of every token."""

    def __init__(self, number_of_states: int = 1) -> None:
        DynamicLayer.__init__(self)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Initialise the keys and values."""
        DynamicLayer.lazy_initialization(self, *args, **kwargs)  # type: ignore[arg-type]

    def get_seq_length(self) -> int:
        """Return the number of tokens whose keys are kept."""
        return DynamicLayer.get_seq_length(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the rows of these indices."""
        StateLayer.reorder_cache(self, beam_idx)
        DynamicLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        StateLayer.batch_repeat_interleave(self, repeats)
        DynamicLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select the rows of these indices."""
        StateLayer.batch_select_indices(self, indices)
        DynamicLayer.batch_select_indices(self, indices)


class StateCache(DynamicCache):
    """A cache of which some layers may keep states alone: it has the tokens of its layers with keys."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens of a layer, or of the first one with keys if that layer has states alone."""
        if layer_idx < len(self.layers) and not isinstance(self.layers[layer_idx], CacheLayerMixin):
            found = next((i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)), None)
            if found is None:
                raise RuntimeError("states alone do not tell how many tokens a cache has")
            layer_idx = found
        return super().get_seq_length(layer_idx)


def _numbered(name: str, index: int) -> str:
    return name if not index else f"{name}_{index}"
