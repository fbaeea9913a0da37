"""All that keeps sizes free during a capture, in one context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peftfx.graph.capturing.sizes.contiguous_views import contiguous_views
from peftfx.graph.capturing.sizes.free_sizes import checks_of_sizes, size_arithmetic, size_tensors
from peftfx.graph.capturing.sizes.pools import pools_of_lines
from peftfx.graph.capturing.sizes.tensor_lengths import free_lengths
from peftfx.graph.capturing.sizes.unsolved import unsolved_left_out


@contextmanager
def kept_free(model: nn.Module) -> Iterator[None]:
    """Keep the sizes that the code of a model's modules computes with free, in this thread."""
    with (
        free_lengths(model),
        size_arithmetic(),
        size_tensors(),
        checks_of_sizes(),
        pools_of_lines(),
        contiguous_views(),
        unsolved_left_out(),
    ):
        yield
