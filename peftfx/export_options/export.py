"""ExportOptions: what may be asked of the export of a model, checked whole when it is made.

Nothing large is imported for it, so that a mistake is told before a model is loaded, in Python as on the command line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from peftfx.errors import PeftfxError
from peftfx.export_options.checked import Checked
from peftfx.export_options.quantize import Scheme, check_calibration, parse_schemes
from peftfx.export_options.values import MaxError, Slots, refuse_idle_bounds
from peftfx.field_types import refuse_misfit_fields
from peftfx.options import AUTO, CPU, FAST, check_choices, check_opset, check_tolerance, parse_size


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Checked):
    """What may be asked of the export of a model.

    Args:
        merge: fold the adapters into the weights; otherwise they stay apart, as initializers under their own names.
            By default they are folded, but for a quantised base, which is exported as it is: its codes are not
            rounded again, and the adapters stay beside them; see `peftfx.export.coded`.
        view: `forward`, `decode`, with the key/value cache in and out, or `auto`: `decode` for a model that generates
            text, without `inputs` of a forward call.
        opset: version of the ONNX operators; by default torch's choice.
        engine: `fast`, which translates each distinct operation once, or `torch`, which uses torch.onnx; see `to_onnx`.
        optimize: `cpu` or `cuda`: whole attentions, rotary embeddings and norms; or `none`; see `to_onnx`.
        quantize: `int8`, `int4` or `nf4`: weights of products are rounded in blocks, by role where it says so, as in
            `int4; int8@head`; see `peftfx.export_options.quantize`.
        budget: bytes of all weights, as a number or as `1.2GB`: each role's weights are rounded to int4, int8 or not at
            all, so that they fit and the model differs least, as measured role by role; see
            `peftfx.export.rounding.budget`.
        max_error: what a quantised model may differ by from the same model in floating point: a number is over the
            largest magnitude of an output; `kl=0.05` bounds the mean divergence on a text in nats, and `top1=0.9` is
            the least share of tokens whose likeliest next one is the same. By default these are measured and
            reported, and may be whatever they are.
        calibration: a file of text that a quantised model is compared on, for a `source` with a tokenizer; by default
            the model's own greedy text. Under `int4(gptq=True)` weights are rounded by it, too, but for its last fifth,
            on which the model is compared.
        slots: for a base without adapters: where adapters can be put when the model runs, or at which layers alone,
            as a target; see `peftfx.export.slots.swappable`.
        batched: names of adapters of the model among which each row of a batch chooses; see
            `peftfx.export.slots.batched`.
        atol, rtol: what may differ: `atol + rtol * largest magnitude` of an output. By default it is measured: a
            multiple of what the model in torch is from itself in float64; see
            `peftfx.export.verification.tolerance`.
        max_memory: bytes that may be allocated beyond the model itself, as a number or as `4GB`; refused where fewer
            than `memory_needed`.
        allow_fixed: export a model whose code branches on a size, though the export is right on the example's side
            alone; the report and the model's metadata say for which sizes that is.
        force: replace the directory if it exists.

    Raises:
        PeftfxError: an option has another type or is none of its choices, or two contradict each other.
    """

    merge: bool | None = None
    view: Literal["forward", "decode", "auto"] = AUTO
    opset: int | None = None
    engine: Literal["fast", "torch"] = FAST
    optimize: Literal["cpu", "cuda", "none"] = CPU
    quantize: str | None = None
    budget: int | str | None = None
    max_error: float | str | None = None
    calibration: str | Path | None = None
    slots: Slots | str | None = None
    batched: Collection[str] = ()
    atol: float | None = None
    rtol: float | None = None
    max_memory: int | str | None = None
    allow_fixed: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        refuse_misfit_fields(self)
        if not isinstance(self.batched, Mapping):
            names = sorted(self.batched) if isinstance(self.batched, set | frozenset) else self.batched
            object.__setattr__(self, "batched", tuple(names))
        check_choices(self)
        check_opset(self.opset)
        check_tolerance(self.atol, self.rtol)
        self._check_quantization()
        self._check_places()
        _ = self.memory

    @property
    def bound(self) -> MaxError | None:
        """What quantisation may cost, where somebody said it."""
        return MaxError.of(self.max_error)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """`quantize`, read."""
        return () if self.quantize is None else parse_schemes(self.quantize)

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded."""
        return self.quantize is not None or self.budget is not None

    @property
    def room(self) -> int | None:
        """`budget` in bytes."""
        return parse_size(self.budget, "budget") if isinstance(self.budget, str) else self.budget

    @property
    def memory(self) -> int | None:
        """`max_memory` in bytes."""
        return parse_size(self.max_memory) if isinstance(self.max_memory, str) else self.max_memory

    @property
    def places(self) -> Slots | None:
        """`slots`, as an object."""
        return None if self.slots is None else Slots.of(self.slots)

    def merges(self, quantised: bool) -> bool:
        """Whether adapters are folded into a base that is quantised, or is not."""
        return not quantised if self.merge is None else self.merge

    def _check_quantization(self) -> None:
        if self.quantize is not None and self.budget is not None:
            raise PeftfxError("a budget chooses by itself what is rounded", "quantize, budget", "leave one of them out")
        refuse_idle_bounds(self.rounds, max_error=self.max_error, calibration=self.calibration)
        for name, given in (("atol", self.atol), ("rtol", self.rtol)):
            if self.rounds and given is not None:
                what = f"what quantisation may cost is bounded by max_error, not by {name}"
                raise PeftfxError(what, f"quantize, {name}", "pass max_error instead, as in max_error=0.1")
        _ = self.bound, self.room
        check_calibration(self.schemes, self.calibration, tuple(self.batched))

    def _check_places(self) -> None:
        names, places = list(self.batched), self.places
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PeftfxError("an adapter that rows choose is named twice", twice, "name each once")
        if names and places is not None:
            what = "batched and swappable are both given"
            raise PeftfxError(what, f"batched, slots: {', '.join(names)}", "export two directories")
        if self.merge and (names or places is not None):
            what = "adapters that are chosen when the graph runs cannot be merged"
            raise PeftfxError(what, "merge, batched" if names else "merge, slots", "leave merge out")
        if names and self.calibration is not None:
            hint = "leave the calibration text out, or export each adapter merged"
            raise PeftfxError("a batched export cannot be compared on a text", "batched, calibration", hint)


class ExportChoices(TypedDict, total=False):
    """Options that both kinds of exports have, by name, for type checkers."""

    merge: bool | None
    view: Literal["forward", "decode", "auto"]
    opset: int | None
    engine: Literal["fast", "torch"]
    optimize: Literal["cpu", "cuda", "none"]
    quantize: str | None
    budget: int | str | None
    max_error: float | str | None
    calibration: str | Path | None
    slots: Slots | str | None
    atol: float | None
    rtol: float | None
    max_memory: int | str | None
    allow_fixed: bool
    force: bool


class ExportChanges(ExportChoices, total=False):
    """Options of `ExportOptions` by name, for type checkers."""

    batched: Sequence[str]
