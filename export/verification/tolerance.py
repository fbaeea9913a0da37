"""Tolerance: what an export may differ from its reference by, measured where nobody says it.

The reference is run in its own dtype and in float64. Two right programs in one dtype differ by about as much as either
differs from exact arithmetic, so what an output may differ by is

    MULTIPLE * (largest difference between the two runs) + FLOOR * eps32 * (largest magnitude of the output)

The floor is for outputs of few numbers, which can be right by chance, and for functions that ONNX Runtime approximates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftfx.errors import first_line
from peftfx.export.verification.float64 import float64

Tensors = dict[str, Tensor]
MULTIPLE = 8
FLOOR = 128  #: in units of what float32 can tell apart
USUAL, USUAL_HALF = 1e-4, 2e-2  #: absolute, and relative to the largest magnitude, where float64 cannot be had


@dataclass
class Tolerance:
    """What may differ: `atol + rtol * largest magnitude` where these are given, else as above.

    Attributes:
        atol, rtol: as given; None is measured.
        noise: for each output, the largest noise that was measured over the largest magnitude there.
        half: whether an output is in half precision.
        failure: why float64 could not be had.
    """

    atol: float | None
    rtol: float | None
    noise: dict[str, float] = field(default_factory=dict)
    half: bool = False
    failure: str = ""

    @property
    def measures(self) -> bool:
        """Whether nobody said what may differ."""
        return self.atol is None and self.rtol is None

    def measure(self, reference: Callable[[Tensors], Tensors], feed: Tensors) -> Tensors:
        """What the reference gives in float64; nothing where it cannot be run so."""
        try:
            with torch.no_grad(), float64():
                return reference(feed)
        except Exception as error:  # an operator without float64, in a model's own code
            self.failure = first_line(error)
            return {}

    def learn(self, output: str, noise: float | None, largest: float, dtype: torch.dtype) -> None:
        """Note what one output showed."""
        self.half |= dtype in (torch.float16, torch.bfloat16)
        if noise is not None and largest:
            self.noise[output] = max(self.noise.get(output, 0.0), noise / largest)

    def bound(self, output: str, largest: float, dtype: torch.dtype) -> float:
        """What an output whose magnitude is at most `largest` may differ by."""
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
        """How the bounds were made, in words."""
        if self.measures and self.noise:
            return f"the tolerance is {MULTIPLE} times what torch is from float64 here; --atol and --rtol set another"
        usual = USUAL_HALF if self.half else USUAL
        atol, rtol = (usual if given is None else given for given in (self.atol, self.rtol))
        return f"the tolerance is {atol:g} + {rtol:g} * the largest magnitude"
