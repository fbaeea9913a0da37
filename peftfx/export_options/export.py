"""The options of the export of a model, checked as a whole when an object is made.

This module imports no large library. So a mistake is reported before a model is loaded, in Python and on the command
line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from peftfx.errors import PeftfxError
from peftfx.export_options.checked import Checked
from peftfx.export_options.quantize import Scheme, check_calibration, parse_schemes
from peftfx.export_options.values import MaxError, Slots, parse_image_size, refuse_idle_bounds
from peftfx.field_types import refuse_misfit_fields
from peftfx.options import AUTO, CPU, FAST, check_choices, check_opset, check_tolerance, parse_size


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Checked):
    """The options of the export of a model.

    Args:
        merge: fold the adapters into the weights; otherwise they stay unmerged, as initializers under their own names.
            By default adapters are merged, except on a quantised base, which is exported as it is: its codes are not
            rounded again, and the adapters stay beside the codes; see `peftfx.export.coded`.
        view: `forward`; `decode`, with the key/value cache in and out; or `auto`, which is `decode` for a model that
            generates text, without images beside it, if no `inputs` of a forward call are given; otherwise `forward`.
        opset: the version of the ONNX operators; by default torch's choice.
        engine: `fast`, which translates each distinct operation once, or `torch`, which uses torch.onnx; see `to_onnx`.
        optimize: `cpu` or `cuda` fuse attentions, rotary embeddings and norms into one operator each; `none` does not;
            see `to_onnx`.
        quantize: round the weights of products in blocks: `int8`, `int4` or `nf4`, or by role, such as
            `int4; int8@head`; see `peftfx.export_options.quantize`.
        budget: the most bytes of all weights, as a number or as text such as `1.2GB`. Each role's weights are rounded
            to int4, to int8 or not at all, so that the weights fit and the outputs change least, as measured for each
            role; see `peftfx.export.rounding.budget`.
        max_error: how far a quantised model may differ from the same model in floating point. A number is relative to
            the largest magnitude of an output. `kl=0.05` bounds the mean divergence on a text, in nats. `top1=0.9` is
            the smallest share of tokens whose likeliest next token is the same. By default these errors are measured
            and reported, but not bounded.
        calibration: a text file on which a quantised model is compared; it needs a `source` with a tokenizer. By
            default the model's own greedy text is used. With `int4(gptq=True)`, GPTQ uses this text as well, except for
            its last fifth, on which the model is compared.
        slots: for a base without adapters, the slots into which adapters can be put when the model runs, as `Slots`, or
            as a target that picks the layers; see `peftfx.export.slots.swappable`.
        batched: the names of adapters of the model from which each row of a batch chooses; see
            `peftfx.export.slots.batched`.
        atol, rtol: the tolerance `atol + rtol * largest magnitude` of an output. By default the tolerance is measured:
            a multiple of the model's own difference in torch between its dtype and float64; see
            `peftfx.export.verification.tolerances.tolerance`.
        max_memory: the most bytes that may be allocated besides the model itself, as a number or as text such as `4GB`.
            An export that needs more (`memory_needed`) is refused.
        allow_fixed: export a model even if its code branches on a size, and the export is right only on the example's
            side of the branch. The report and the model's metadata give these sizes.
        image_size: the height and width of the images of a forward view: a number for both, a pair, or text such as
            `384x512`. By default the size is that in the model's config, or in its processor's. A model that can
            interpolate its position embeddings does so for another size. `any` leaves the height and the width free,
            if the model's code allows it; convolutional models are free without it. In a decode view it is for models
            in which a picture's size decides how many pieces it has; all images then have this size.
        videos: also export the graph of videos beside a text, and let the graph of the text take what it gives. For
            decode views of models of text, images and videos. Frames have the size of images.
        merged_decoder: also write `decoder_model_merged.onnx`, the decoder of an encoder-decoder in the form that
            optimum reads; see `peftfx.export.deployment.merged_decoder`.
        force: replace the directory if it exists.

    Raises:
        PeftfxError: an option has a wrong type or an unknown value, or two options contradict each other.

    Examples:
        >>> options = peftfx.ExportOptions(view="forward", merge=True)
        >>> report = peftfx.load(model, "adapter").export("onnx", options)
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
    image_size: int | tuple[int, int] | str | None = None
    videos: bool = False
    merged_decoder: bool = False
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
        _ = self.memory, self.images

    @property
    def bound(self) -> MaxError | None:
        """The bound on the error of quantisation, if one is given."""
        return MaxError.of(self.max_error)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes in `quantize`."""
        return () if self.quantize is None else parse_schemes(self.quantize)

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded."""
        return self.quantize is not None or self.budget is not None

    @property
    def room(self) -> int | None:
        """The `budget` in bytes."""
        return parse_size(self.budget, "budget") if isinstance(self.budget, str) else self.budget

    @property
    def memory(self) -> int | None:
        """The limit `max_memory` in bytes."""
        return parse_size(self.max_memory) if isinstance(self.max_memory, str) else self.max_memory

    @property
    def images(self) -> tuple[int, int] | Literal["any"] | None:
        """The `image_size` as a height and a width, or `any`."""
        return parse_image_size(self.image_size)

    @property
    def places(self) -> Slots | None:
        """The `slots` as an object."""
        return None if self.slots is None else Slots.of(self.slots)

    def merges(self, quantised: bool) -> bool:
        """Say whether adapters are folded into the base, which is `quantised` or not."""
        return not quantised if self.merge is None else self.merge

    def _check_quantization(self) -> None:
        if self.quantize is not None and self.budget is not None:
            what = "quantize and budget are both given, but a budget itself decides how each weight is rounded"
            raise PeftfxError(what, "quantize, budget", "leave one of them out")
        refuse_idle_bounds(self.rounds, max_error=self.max_error, calibration=self.calibration)
        for name, given in (("atol", self.atol), ("rtol", self.rtol)):
            if self.rounds and given is not None:
                what = f"the error of a quantised model is bounded by max_error, not by {name}"
                raise PeftfxError(what, f"quantize, {name}", "pass max_error instead, as in max_error=0.1")
        _ = self.bound, self.room
        check_calibration(self.schemes, self.calibration, tuple(self.batched))

    def _check_places(self) -> None:
        names, places = list(self.batched), self.places
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PeftfxError("batched names an adapter twice", twice, "name each adapter once")
        if names and places is not None:
            what = "batched and swappable are both given"
            raise PeftfxError(what, f"batched, slots: {', '.join(names)}", "export two directories")
        if self.merge and (names or places is not None):
            what = "adapters that are chosen when the graph runs cannot be merged"
            raise PeftfxError(what, "merge, batched" if names else "merge, slots", "leave merge out")
        if self.merged_decoder and (names or places is not None):
            what = "merged_decoder is for adapters that are in the weights, or for none"
            raise PeftfxError(what, "merged_decoder, batched" if names else "merged_decoder, slots", "leave one out")
        if names and self.calibration is not None:
            hint = "leave the calibration text out, or export each adapter merged"
            raise PeftfxError("a batched export cannot be compared on a text", "batched, calibration", hint)


class ExportChoices(TypedDict, total=False):
    """The options that both kinds of exports have, by name, for type checkers."""

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
    image_size: int | tuple[int, int] | str | None
    videos: bool
    merged_decoder: bool
    force: bool


class ExportChanges(ExportChoices, total=False):
    """The fields of `ExportOptions` by name, for type checkers."""

    batched: Sequence[str]
