"""The tolerance of an export's outputs. It is measured if the user gives none.

The reference is run in its own dtype and in float64. Two correct programs in one dtype differ by about as much as each
differs from exact arithmetic. So the tolerance of an output is

    MULTIPLE * (largest difference between the two runs) + FLOOR * eps32 * (largest magnitude of the output)

The floor is for outputs with few numbers, whose measured difference can be small by chance, and for functions that ONNX
Runtime approximates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftfx.errors import first_line
from peftfx.export.verification.tolerances.float64 import float64

Tensors = dict[str, Tensor]
MULTIPLE = 8
FLOOR = 128  #: in units of float32's machine epsilon
USUAL, USUAL_HALF = 1e-4, 2e-2  #: absolute, and relative to the largest magnitude, if float64 cannot be used


@dataclass
class Tolerance:
    """The tolerance `atol + rtol * largest magnitude` if these are given; otherwise the measured tolerance.

    Attributes:
        atol, rtol: the given tolerances; measured if both are None.
        noise: for each output, the largest measured noise relative to the largest magnitude in the same call.
        half: whether an output is in half precision.
        failure: why float64 could not be used; empty if it could.
    """

    atol: float | None
    rtol: float | None
    noise: dict[str, float] = field(default_factory=dict)
    half: bool = False
    failure: str = ""

    @property
    def measures(self) -> bool:
        """Whether the tolerance is measured, because none is given."""
        return self.atol is None and self.rtol is None

    def measure(self, reference: Callable[[Tensors], Tensors], feed: Tensors) -> Tensors:
        """Run the reference in float64. Return nothing if it cannot run in float64."""
        try:
            with torch.no_grad(), float64():
                return reference(feed)
        except Exception as error:  # such as an operator without float64 in a model's own code
            self.failure = first_line(error)
            return {}

    def learn(self, output: str, noise: float | None, largest: float, dtype: torch.dtype) -> None:
        """Record the noise of one output."""
        self.half |= dtype in (torch.float16, torch.bfloat16)
        if noise is not None and largest:
            self.noise[output] = max(self.noise.get(output, 0.0), noise / largest)

    def bound(self, output: str, largest: float, dtype: torch.dtype) -> float:
        """Return the tolerance of an output whose magnitude is at most `largest`."""
        if not dtype.is_floating_point:
            return 0.0
        if not self.measures or not self.noise:
            usual = USUAL_HALF if self.half else USUAL
            atol, rtol = (usual if given is None else given for given in (self.atol, self.rtol))
            return atol + rtol * largest
        relative = self.noise.get(output, max(self.noise.values()))
        floor = max(FLOOR * torch.finfo(torch.float32).eps, 2 * torch.finfo(dtype).eps)
        return largest * (MULTIPLE * relative + floor)

    def told(self) -> str:
        """Say in words how the tolerances were made."""
        if self.measures and self.noise:
            return f"the tolerance is {MULTIPLE} times what torch is from float64 here; --atol and --rtol set another"
        usual = USUAL_HALF if self.half else USUAL
        atol, rtol = (usual if given is None else given for given in (self.atol, self.rtol))
        return f"the tolerance is {atol:g} + {rtol:g} * the largest magnitude"
