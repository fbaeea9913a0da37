"""The tolerance of an export's outputs. It is measured if the user gives none.

The reference is run in its own dtype and in float64. Two correct programs in one dtype differ by about as much as each
differs from exact arithmetic. So the tolerance of an output is

    MULTIPLE * (largest difference between the two runs) + FLOOR * eps32 * (magnitude of the output)

The floor is for outputs with few numbers, whose measured difference can be small by chance, and for functions that ONNX
Runtime approximates. The magnitude is the largest one in the call, but no less than in half of all calls: the only
number of a regression's output is sometimes nearly zero, and its rounding errors are as large then as in other calls.
An output that a sigmoid makes may differ by SIGMOID * eps32 more: see `peftfx.export.verification.tolerances.sigmoids`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftfx.bases.dtypes import HALF_DTYPES
from peftfx.errors import first_line
from peftfx.export.verification.tolerances.float64 import float64

Tensors = dict[str, Tensor]
MULTIPLE = 8
FLOOR = 128  #: in units of float32's machine epsilon
SIGMOID = 4  #: in the same units, absolute
USUAL, USUAL_HALF = 1e-4, 2e-2  #: absolute, and relative to the largest magnitude, if float64 cannot be used


@dataclass
class Tolerance:
    """The tolerance `atol + rtol * largest magnitude` if these are given; otherwise the measured tolerance.

    Attributes:
        atol, rtol: the given tolerances; measured if both are None.
        learned: for each output, the largest magnitude in each call, and the noise if it was measured.
        sigmoids: the names of the outputs that a sigmoid makes.
        floats_alone: whether other outputs, such as classes, may differ: rounded weights decide near-ties otherwise.
        half: whether an output is in half precision.
        failure: why float64 could not be used; empty if it could.
    """

    atol: float | None
    rtol: float | None
    learned: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)
    sigmoids: frozenset[str] = frozenset()
    floats_alone: bool = False
    half: bool = False
    failure: str = ""

    @property
    def measures(self) -> bool:
        """Whether the tolerance is measured, because none is given."""
        return self.atol is None and self.rtol is None

    @property
    def measured(self) -> bool:
        """Whether the noise of an output was measured."""
        return any(noise is not None for calls in self.learned.values() for _, noise in calls)

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
        self.half |= dtype in HALF_DTYPES
        if largest:
            self.learned.setdefault(output, []).append((largest, noise))

    def bound(self, output: str, largest: float, dtype: torch.dtype) -> float:
        """Return the tolerance of an output whose magnitude is at most `largest`."""
        if not dtype.is_floating_point:
            return 0.0
        if not self.measures or not self.measured:
            usual = USUAL_HALF if self.half else USUAL
            atol, rtol = (usual if given is None else given for given in (self.atol, self.rtol))
            return atol + rtol * largest
        relative = self._noise(output)
        if relative is None:  # all its numbers are zero, or its calls were not measured
            relative = max(noise for name in self.learned if (noise := self._noise(name)) is not None)
        eps = torch.finfo(torch.float32).eps
        floor = max(FLOOR * eps, 2 * torch.finfo(dtype).eps)
        wanted = max(largest, self._typical(output)) * (MULTIPLE * relative + floor)
        return wanted + SIGMOID * eps if output in self.sigmoids else wanted

    def _noise(self, output: str) -> float | None:
        """Return the largest measured noise of an output, relative to its magnitude."""
        typical, calls = self._typical(output), self.learned.get(output, ())
        return max((noise / max(largest, typical) for largest, noise in calls if noise is not None), default=None)

    def _typical(self, output: str) -> float:
        """Return what the magnitude of an output reaches in half of all calls; 0 for one that is always zero."""
        found = sorted(largest for largest, _ in self.learned.get(output, ()))
        return found[(len(found) - 1) // 2] if found else 0.0

    def told(self) -> str:
        """Say in words how the tolerances were made."""
        if self.measures and self.measured:
            return f"the tolerance is {MULTIPLE} times what torch is from float64 here; --atol and --rtol set another"
        usual = USUAL_HALF if self.half else USUAL
        atol, rtol = (usual if given is None else given for given in (self.atol, self.rtol))
        return f"the tolerance is {atol:g} + {rtol:g} * the largest magnitude"
