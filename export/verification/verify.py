"""Verify an export: ONNX Runtime computes what the reference computes, or a VerificationError says where not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from peftfx.errors import warn
from peftfx.export.verification.choices import Following, Nearness, ShownChoices, shown_choices
from peftfx.export.verification.comparison import Comparison, Reference, Shown, VerificationError, compared, judged
from peftfx.export.verification.float32_twin import runnable
from peftfx.export.verification.in_parts import InParts
from peftfx.export.verification.sizes.axes import refuse_other_inputs, refuse_other_sizes
from peftfx.export.verification.tolerances.sigmoids import made_by_sigmoids
from peftfx.export.verification.tolerances.tolerance import Tensors, Tolerance
from peftfx.graph.graph import Graph
from peftfx.serving.onnx_model import OnnxModel, find
from peftfx.telling import tell_share

MAPPED = 256 << 20  #: bytes of a model from which its weights are mapped, and not copied by ONNX Runtime


def verify(
    directory: Path,
    reference: Reference,
    inputs: Sequence[Tensors],
    *,
    atol: float | None = 1e-4,
    rtol: float | None = 1e-4,
    floats_alone: bool = False,
    graph: Graph | None = None,
    shown: Shown | None = None,
    put: Mapping[str, ort.OrtValue] | None = None,
    measured: Collection[int] | None = None,
    unrounded: Reference | None = None,
    empty: Collection[str] = (),
    on_loose: Callable[[str], object] = warn,
) -> list[Comparison]:
    """Run the model saved in `directory` and the `reference` on each set of inputs, and compare every output.

    A model in bfloat16 is run as its float32 twin over the same weights (`runnable`), because ONNX Runtime's CPU
    provider has no bfloat16 kernels. A large model is run in parts: see `peftfx.export.verification.in_parts`.
    Outputs that are not floating-point have to be equal, or may differ (`floats_alone`). If the first two axes of
    an output are those of `attention_mask`, the output is not compared at tokens where the mask is 0: results for
    padding do not matter. A model in half precision that chooses experts is compared under its own choices
    (`peftfx.export.verification.choices`), and so is another one that would be refused, or whose measured tolerance
    lets nearly any answer pass. If it makes no choices, a warning tells of such a tolerance.

    Args:
        directory: the directory that `save` wrote, or the model's `.onnx` file.
        reference: computes what the model has to give.
        inputs: the calls to compare. Sizes that the export never saw prove most.
        atol: the absolute tolerance.
        rtol: the tolerance relative to the largest magnitude of an output. If both are None, the tolerance is measured:
            see `peftfx.export.verification.tolerances.tolerance`.
        floats_alone: whether outputs that are not floating-point may differ, as rounding decides near-ties.
        graph: if given, the model also has to have the inputs and axes of this graph.
        shown: selects what to compare of an output, in place of the rule for `attention_mask` above.
        put: the tensors to put into the model's slots.
        measured: the numbers of the calls that are also run in float64 if the tolerance is measured; by default all.
        unrounded: computes in torch what the model computes, without the rounding of its weights. It is held to the
            reference by the measured tolerance.
        empty: slots whose tensors in the first call change nothing. The model runs that call without them, by what its
            file has in them.
        on_loose: called with a sentence if a measured tolerance lets nearly any answer pass.

    Raises:
        VerificationError: an output is missing, has a NaN, or differs by more than the tolerance.
    """
    saved = find(directory)
    where = str(saved)
    with contextlib.ExitStack() as stack:
        path, widened = stack.enter_context(runnable(saved))
        large = is_mapped(path)
        model = OnnxModel(path, mapped=large)
        model.put(put or {})
        if graph is not None:
            refuse_other_inputs(model, graph)
        calls = [_widened(feed, model) if widened else feed for feed in inputs]
        asked = _Asked(
            where,
            reference,
            feeds=inputs,
            calls=[*_left_out(calls[:1], empty), *calls[1:]],
            measured=range(len(inputs)) if measured is None else measured,
            shown=shown or functools.partial(unpadded, model.axes),
            sigmoids=frozenset() if graph is None else made_by_sigmoids(graph),
            kinds=_declared(saved),
        )
        tolerance = Tolerance(atol, rtol, sigmoids=asked.sigmoids, floats_alone=floats_alone)
        follows = None
        if tolerance.measures and not large and unrounded is None:
            follows = stack.enter_context(shown_choices(path))
        under_choices = functools.partial(asked.under_choices, follows, put or {})
        if follows is not None and (widened or follows.half) and (found := under_choices()):
            return found
        found = asked.outputs(model, tolerance, unrounded, InParts(model) if large else None)
        try:
            good = judged(found, tolerance, where)
        except VerificationError:
            with contextlib.suppress(VerificationError):
                if found := under_choices():
                    return found
            raise
        loose = [c for c in good if tolerance.measures and c.says_little]
        if loose and (found := under_choices()):  # float64 made another choice than float32
            return found
        if loose:
            on_loose(_loosest(loose, where))
        return good


@dataclass(frozen=True)
class _Asked:
    """What a verification is asked to compare.

    Attributes:
        where: the model's file, for errors.
        reference: computes what the model has to give.
        feeds: the inputs of each call.
        calls: the same inputs, as the model that runs takes them.
        measured: the numbers of the calls that are also run in float64 if the tolerance is measured.
        shown: selects what to compare of an output.
        sigmoids: the names of the outputs that a sigmoid makes.
        kinds: the dtypes of the outputs in the model's file. A float32 twin has others.
    """

    where: str
    reference: Reference
    feeds: Sequence[Tensors]
    calls: Sequence[Tensors]
    measured: Collection[int]
    shown: Shown
    sigmoids: frozenset[str]
    kinds: Mapping[str, torch.dtype]

    def outputs(
        self, model: OnnxModel, tolerance: Tolerance, unrounded: Reference | None, cut: InParts | None
    ) -> list[Comparison]:
        """Run the model, and compare its outputs. The comparisons are not judged yet.

        Args:
            model: the model.
            tolerance: learns the noise of each output, if it is measured.
            unrounded: see `verify`.
            cut: runs the model in parts, if it is large.

        Raises:
            VerificationError: what `unrounded` gives differs from the reference.
        """
        found, plain, tight = list[Comparison](), list[Comparison](), Tolerance(None, None)
        measures = tolerance if unrounded is None else tight
        answers = (model(**call) for call in self.calls) if cut is None else cut(self.calls)
        parts, start = (1, 0.5) if cut is None else (len(cut.parts), 0.75)
        for number, (feed, got) in enumerate(zip(self.feeds, answers, strict=True)):
            self._tell(number, start)
            refuse_other_sizes(model, feed, got)
            want = self.reference(feed)
            exact = measures.measure(self.reference, feed) if measures.measures and number in self.measured else {}
            told = functools.partial(compared, want, exact, feed, self.shown, where=self.where)
            found += told(got, tolerance, parts, kinds=self.kinds)
            if unrounded is not None:
                plain += told(unrounded(feed), tight, 1)
        judged(plain, tight, self.where, "the graph with the adapter's tensors, in torch, disagrees with the reference")
        return found

    def under_choices(self, shows: ShownChoices | None, put: Mapping[str, ort.OrtValue]) -> list[Comparison]:
        """Compare a model with a reference that chooses what ONNX Runtime chose: `peftfx.export.verification.choices`.

        Return nothing if that cannot be done.

        Args:
            shows: the model's copy that shows its choices; None if it makes none.
            put: the tensors to put into its slots.

        Raises:
            VerificationError: they differ.
        """
        if shows is None:
            return []
        tolerance, near, found = Tolerance(None, None, sigmoids=self.sigmoids), Nearness(), list[Comparison]()
        model = OnnxModel(shows.path)
        model.put(put)
        for number, (feed, call) in enumerate(zip(self.feeds, self.calls, strict=True)):
            self._tell(number, 0.5)
            got = model(**call)
            following = Following(self.reference, shows.taken(got))
            refuse_other_sizes(model, feed, {name: value for name, value in got.items() if name in self.kinds})
            want, own, exact = following(feed), following.scores, Tensors()
            if following.alike and number in self.measured:
                exact = tolerance.measure(following, feed)
                if exact and following.alike:
                    near.learn(following.choices, own, following.scores, feed)
            if not following.alike or tolerance.failure:
                return []
            if following.wrong:
                what = f"choice {following.wrong} of {len(following.choices)} is not of the largest scores"
                told = f"ONNX Runtime disagrees with the reference: {what}"
                raise VerificationError(told, self.where, "report this model")
            found += compared(want, exact, feed, self.shown, got, tolerance, 1, where=self.where, kinds=self.kinds)
        if far := near.too_far:
            what = "ONNX Runtime disagrees with the reference in the scores of a choice"
            raise VerificationError(f"{what}: {far}", self.where, "report this model")
        return judged(found, tolerance, self.where)

    def _tell(self, number: int, start: float) -> None:
        count = len(self.feeds)
        tell_share(f"{number} of {count} calls", start + (1 - start) * number / count)


def _loosest(loose: Sequence[Comparison], where: str) -> str:
    """Return the sentence about the comparison that says least."""
    worst = max(loose, key=lambda c: c.bound / c.largest)
    return (
        f"{where}: the comparison of {worst.output} says little: it may differ by {worst.bound:.2g}, and its "
        f"largest number is {worst.largest:.2g}, as torch itself is {worst.noise:.2g} from float64; give --atol "
        "and --rtol"
    )


def _left_out(calls: Iterable[Tensors], names: Collection[str]) -> list[Tensors]:
    return [{name: value for name, value in call.items() if name not in names} for call in calls]


def _widened(feed: Tensors, model: OnnxModel) -> Tensors:
    """Convert the inputs of a float32 twin from bfloat16 to float32. Slots keep their dtype."""
    wide = {name: value.float() for name, value in feed.items() if value.dtype == torch.bfloat16}
    return feed | {name: value for name, value in wide.items() if name in model.inputs}


def _declared(path: Path) -> dict[str, torch.dtype]:
    """Return the dtypes of a saved model's outputs."""
    outputs = onnx.load(path, load_external_data=False).graph.output
    return {output.name: to_torch_dtype(ir.DataType(output.type.tensor_type.elem_type)) for output in outputs}


def is_mapped(path: Path, times: int = 1) -> bool:
    """Say whether a model's weights are mapped: `times` the bytes in its directory are more than `MAPPED`."""
    return times * sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file()) > MAPPED


def unpadded(axes: Mapping[str, tuple[int | str, ...]], name: str, feed: Tensors, value: Tensor) -> Tensor:
    """Return an output at unmasked tokens, or the whole output if its first two axes are not those of the mask."""
    mask = feed.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool(mask.all()) or axes[name][:2] != axes["attention_mask"]:
        return value
    return value[mask != 0]
