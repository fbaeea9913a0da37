"""What an export needs in memory, told before it starts."""

from __future__ import annotations

from torch import nn

from peftfx.errors import PeftfxError

_FIXED = 1 << 30  #: bytes for the libraries, the graph, and ONNX Runtime's activations
_AT_ONCE = 3  #: tensors in memory at a time: a weight in fp32, what it is folded to, and its rounding or transpose


def memory_needed(model: nn.Module) -> int:
    """The most anonymous memory an export takes, in bytes, beyond the model as it is loaded.

    A model from safetensors files is mapped: it is in no memory but what the kernel can drop.
    """
    return _FIXED + _AT_ONCE * 4 * max((p.numel() for p in model.parameters()), default=0)


def refuse_memory(model: nn.Module, limit: int | None) -> None:
    """Refuse a limit that the export could not keep to."""
    needed = memory_needed(model)
    if limit is not None and limit < needed:
        hint = f"allow {needed / 1e9:.1f} GB or more: weights are read and written one at a time"
        raise PeftfxError(f"{limit:,} bytes are allowed, {needed:,} are needed", "max_memory", hint)
