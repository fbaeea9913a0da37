"""Layers of a cache with states of fixed size, what convolutions saw last and what recurrences carry, each as a tensor.

transformers' own layers write into the memory of their states, so that a model that is compiled finds them in one
place. These take a tensor and leave another in its place: a graph has one as its input and the other as its output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

CONV_STATE, RECURRENT_STATE = "conv_state", "recurrent_state"


class StateLayer(LinearAttentionCacheLayerMixin):
    """A layer of convolutions and recurrences.

    Each state is an attribute of its own: whoever looks at what a layer changed sees it.
    """

    is_compileable = False  # type: ignore[assignment]
    is_croppable = False  # type: ignore[assignment]

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
        """Put a state in: the layer goes on from it."""
        setattr(self, name, state)
        setattr(self, f"started_{self.states.index(name) // 2}", True)

    def _all(self, name: str) -> dict[int, Tensor | None]:
        return {i: getattr(self, _numbered(name, i)) for i in range(self.number_of_states)}

    @property
    def conv_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """Of each convolution, [batch, channels, kernel]."""
        return self._all(CONV_STATE)

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """Of each recurrence."""
        return self._all(RECURRENT_STATE)

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        """Whether there was a call before."""
        return {i: getattr(self, f"started_{i}") for i in range(self.number_of_states)}

    @property
    def is_conv_states_initialized(self) -> dict[int, bool]:  # type: ignore[override]
        """Which convolutions have a state."""
        return {i: state is not None for i, state in self.conv_states.items()}

    @property
    def is_recurrent_states_initialized(self) -> dict[int, bool]:  # type: ignore[override]
        """Which recurrences have a state."""
        return {i: state is not None for i, state in self.recurrent_states.items()}

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Nothing: a state is there when it is first written."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: object
    ) -> Tensor:
        """The state and what is new behind it, [batch, channels, ...]; the last of it is the new state."""
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
        """Keep the new state, of the dtype that there was."""
        name = _numbered(RECURRENT_STATE, state_idx)
        before = getattr(self, name)
        kept = recurrent_states if before is None else recurrent_states.to(before.dtype)
        setattr(self, name, kept)
        return kept

    def reset(self) -> None:
        """Forget all of it."""
        self.__init__(self.number_of_states)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens out of a state."""
        raise RuntimeError("tokens cannot be taken out of a recurrent state")

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.states:
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, change(state))

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
        """Take these rows."""
        self._each(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take these rows."""
        self._each(lambda state: state[indices])


class StateAndAttentionLayer(StateLayer, DynamicLayer):  # type: ignore[misc]
    """A layer that has states, and keys and values of every token too."""

    def __init__(self, number_of_states: int = 1) -> None:
        DynamicLayer.__init__(self)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Of keys and values."""
        DynamicLayer.lazy_initialization(self, *args, **kwargs)  # type: ignore[arg-type]

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
        """Take these rows."""
        StateLayer.reorder_cache(self, beam_idx)
        DynamicLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        StateLayer.batch_repeat_interleave(self, repeats)
        DynamicLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take these rows."""
        StateLayer.batch_select_indices(self, indices)
        DynamicLayer.batch_select_indices(self, indices)


def _numbered(name: str, index: int) -> str:
    return name if not index else f"{name}_{index}"
