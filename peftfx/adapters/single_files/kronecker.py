"""LoKr of LyCORIS in a single file: its tensors are HF PEFT's, and its ranks and sizes are read from their shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from peftfx.adapters.single_files.keys import ALPHA
from peftfx.errors import PeftfxError
from peftfx.methods.lokr import T2, W1, W1A, W1B, W2, W2A, W2B, lycoris_factors

_ONES, _OTHERS = ({W1}, {W1A, W1B}), ({W2}, {W2A, W2B}, {T2, W2A, W2B})


def is_kronecker(names: Collection[str]) -> bool:
    """Return whether tensors of these names are the two factors of a Kronecker product."""
    return any(set(names) == one | other for one in _ONES for other in _OTHERS)


def kronecker_config(
    own: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module], path: str
) -> tuple[dict[str, int], dict[str, float], dict[str, object]]:
    """Return the rank and the alpha of each module, and HF PEFT's other options of a LoKr.

    LyCORIS scales an update by `alpha / r`; by 1 if neither factor is a product, for it has no rank then.

    Args:
        own: the tensors by module.
        modules: the modules of the model.
        path: the file.

    Raises:
        PeftfxError: the sizes of the factors are not what HF PEFT makes of the weights by one option.
    """
    sizes = {place: _sizes(parts, modules[place]) for place, parts in own.items()}
    ranks = {place: _rank(parts, sizes[place]) for place, parts in own.items()}
    alphas = {
        place: float(parts[ALPHA]) if ALPHA in parts and parts.keys() & {W1B, W2B} else float(ranks[place])
        for place, parts in own.items()
    }
    options: dict[str, object] = {
        "decompose_both": any(W1A in parts for parts in own.values()),
        "decompose_factor": _factor([pair for pairs in sizes.values() for pair in pairs], path),
        "use_effective_conv2d": any(T2 in parts for parts in own.values()),
    }
    return ranks, alphas, options


def _sizes(parts: Mapping[str, Tensor], module: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the number of outputs and its first factor, and the number of inputs and its first factor."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = len(parts[W1] if W1 in parts else parts[W1A])
    return (len(weight), rows), (weight.shape[1], parts[W1 if W1 in parts else W1B].shape[1])


def _rank(parts: Mapping[str, Tensor], sizes: Collection[tuple[int, int]]) -> int:
    """Return the rank of the factors that are products; where none is, one so large that none would be."""
    product = parts.get(W2B, parts.get(W1B))
    return len(product) if product is not None else max(max(first, size // first) for size, first in sizes)


def _factor(sizes: Collection[tuple[int, int]], path: str) -> int:
    """Return the option by which each of these numbers has this first factor."""
    for near in (-1, *range(1, 1 + max(first for _, first in sizes))):
        if all(lycoris_factors(size, near)[0] == first for size, first in sizes):
            return near
    what = "its Kronecker products have factors of other sizes than HF PEFT makes by one decompose_factor"
    raise PeftfxError(what, path, "was it trained on this model? Otherwise convert it to a LoRA where it was made")
