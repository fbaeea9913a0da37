"""The report of an export: what was done, returned to the caller and written beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

import torch

from peftfx.adapters.recipes import Rounding
from peftfx.errors import how_many, listed
from peftfx.export.coded.place import Choice
from peftfx.export.reports.series import in_series
from peftfx.export.rounding.budget import Share
from peftfx.export.rounding.calibrated import Fitted
from peftfx.export.verification.agreement import Agreement
from peftfx.export.writing.earlier_output import files_in
from peftfx.export.writing.memory import memory_line
from peftfx.formats import REPORT, with_version
from peftfx.model.adapted import AdaptedModel
from peftfx.options import FAST

TWIN = "its float32 twin, over the same weights"  #: what ONNX Runtime runs of a graph in bfloat16


class ToldAdapter(TypedDict):
    """An adapter as a report tells it: its name, the classes of its rules, its parameters, and the bytes of all."""

    name: str
    methods: list[str]
    parameters: int
    bytes: int


class ToldComparison(TypedDict):
    """The verification of an output at a probe, as a report tells it; see `Report.comparisons`."""

    output: str
    probe: int
    max_abs: float
    max_rel: float
    bound: float | None
    float32: float | None


@dataclass
class Report:
    """The report of an export, as written to `peftfx_report.json` in its directory.

    Attributes:
        model: the class of the base model.
        adapters: the exported adapters: name, methods, number of parameters, and their bytes.
        tensors: how many tensors of the adapters' files went to each destination. The counts add up to all tensors in
            the files.
        merged: the module paths whose weights the adapters were merged into, or were replaced by trained copies. Empty
            if the adapters stayed unmerged.
        merged_bytes: the size of those weights, and of their changed biases.
        rounding: what each merged weight lost to the dtype of the weights: the largest difference `max_abs`, and the
            same relative to the weight's largest value, `max_rel`. Empty in fp32, in which merged weights are computed.
        passes: for each of the user's own passes, at how many places it changed something.
        folded: what else became a constant of the graph, such as soft prompts and whatever they were computed from.
        inputs, outputs: the inputs of the ONNX model with their shapes, and its outputs. If there are several models,
            names have the model's name as a prefix, such as `decoder_model.logits`.
        sizes: the conditions on the sizes of a call under which the model is right, and what happens otherwise. Empty
            if the model is right at all sizes.
        slots: the number of optional inputs, into which adapters are put when the model runs.
        opset: version of the ONNX operators.
        fused: the number of fused operators, each of which stands for a whole attention, rotary embedding or norm.
        quantized: for each graph, the names of the weights that were rounded.
        left: for each graph, why other weights were not rounded, by their names.
        schemes: for each graph, the number of weights that were rounded by each scheme.
        budget: what each role got of a budget of bytes, what each scheme costs that role alone, and why.
        codes: for each graph, how the weights of a quantised base are written: their format; the operator that holds
            their codes, or `float32`; and the reason.
        gptq: what GPTQ did, if it was asked for: the text, the error of the outputs, and which weights it left.
        agreement: for each graph that gives logits, how far it agrees with the floating-point model on a text.
        engine: the engine that translated to ONNX; if it is not the one asked for, why.
        nodes: the number of nodes in the ONNX graph.
        bytes: the size of each of the model's own files.
        files: all files that were written, as paths in the directory.
        not_written: why a file that tells another runtime how to serve the model was not written, by its name.
        seconds: wall time of each stage.
        memory: the peak memory of the process in each stage, in bytes, without mapped files. Sampled every 20 ms on
            Linux; empty on other systems.
        verified: what ONNX Runtime ran: the model itself, or its float32 twin over the same weights; and in how many
            parts, if the model is large.
        reference: what the model was compared with.
        unmeasured: why the reference could not be run in float64; then the tolerances are constants. Empty if it could.
        idle: the module paths at which an adapter acts, but which ran in none of the compared calls.
        probes: the input shapes of each compared call; `*` stands for every layer of a cache.
        comparisons: the verification of each output at each probe (`probe` is its number): the largest difference, the
            same relative to the largest magnitude, the tolerance, and how far the reference's own rounding is from
            float64.
        versions: the versions of the libraries that made the export.
    """

    model: str
    adapters: list[ToldAdapter] = field(default_factory=list)
    tensors: dict[str, int] = field(default_factory=dict)
    merged: list[str] = field(default_factory=list)
    merged_bytes: int = 0
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    inputs: dict[str, list[int | str]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    slots: int = 0
    opset: int = 0
    fused: dict[str, int] = field(default_factory=dict)
    quantized: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, dict[str, str]] = field(default_factory=dict)
    schemes: dict[str, dict[str, int]] = field(default_factory=dict)
    budget: list[Share] = field(default_factory=list)
    codes: dict[str, list[Choice]] = field(default_factory=dict)
    gptq: Fitted | None = None
    agreement: dict[str, Agreement] = field(default_factory=dict)
    engine: str = FAST
    nodes: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    not_written: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    verified: str = ""
    reference: str = ""
    unmeasured: str = ""
    idle: list[str] = field(default_factory=list)
    probes: list[dict[str, list[int]]] = field(default_factory=list)
    comparisons: list[ToldComparison] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, adapted: AdaptedModel, names: Sequence[str]) -> Report:
        """Make a report that names the model, the adapters in `names`, and the versions of the libraries."""
        adapters: list[ToldAdapter] = [
            {
                "name": name,
                "methods": [type(rule).__name__ for rule in adapted.adapter(name).rules],
                "parameters": sum(p.numel() for p in adapted.adapter(name).parameters()),
                "bytes": sum(t.numel() * t.element_size() for _, t in adapted.adapter(name).tensors()),
            }
            for name in names
        ]
        return cls(type(adapted.base).__name__, adapters, versions=versions())

    def measure(self, directory: Path) -> None:
        """Add the sizes of the files in a directory."""
        self.bytes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}

    def write(self, directory: Path) -> None:
        """Write `peftfx_report.json` into the directory, as its last file."""
        self.files = [*files_in(directory), REPORT]
        lines = (f"{json.dumps(name)}: {_written(value)}" for name, value in with_version(REPORT, asdict(self)).items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (directory / REPORT).write_text(text, encoding="utf-8")

    def rows(self) -> list[tuple[str, str]]:
        """Return this report in words, as pairs of a name and a text. Names without a text are left out."""
        adapters = ", ".join(f"{'+'.join(a['methods'])} ({a['parameters']:,} parameters)" for a in self.adapters)
        went = ", ".join(f"{count} {place}" for place, count in self.tensors.items())
        whole = "".join(f", {count} {name}" for name, count in self.fused.items())
        counts = [(kind, count) for by in self.schemes.values() for kind, count in by.items()]
        small = "; ".join(f"{how_many(count, 'weight')} as {kind}" for kind, count in counts)
        idle = f"{how_many(len(self.idle), 'module')} with an adapter: {listed(self.idle, 3)}"
        told = [
            ("adapter", adapters or "none"),
            ("tensors", f"{sum(self.tensors.values())} in the file: {went}" if self.tensors else ""),
            ("merged sites", self._merged_sites()),
            *((name, how_many(count, "place")) for name, count in self.passes.items()),
            ("inputs", ", ".join(in_series((n, f" [{', '.join(map(str, s))}]") for n, s in self.inputs.items()))),
            ("outputs", ", ".join(in_series((name, "") for name in self.outputs))),
            ("sizes", f"right where {_few(self.sizes)}" if self.sizes else ""),
            ("slots", f"{how_many(self.slots, 'input')} for adapters that may be left out" if self.slots else ""),
            ("files", ", ".join(f"{n} {b:,} B" for n, b in self.bytes.items())),
            *(("not written", f"{name}: {why}") for name, why in self.not_written.items()),
            ("ONNX", f"opset {self.opset}, {self.nodes:,} nodes{whole}, engine {self.engine}"),
            ("quantised", small),
            *(("not quantised", _first(why)) for why in self.left.values()),
            ("GPTQ", str(self.gptq or "")),
            ("budget", "; ".join(map(str, self.budget))),
            *(("base, as it is", ", ".join(map(str, found))) for found in self.codes.values()),
            *(("agreement", str(found)) for found in self.agreement.values()),
            self._verification(),
            ("runs on", "GPUs: ONNX Runtime's CPU provider has no kernels for bfloat16" if self.in_twin else ""),
            ("compared with", self.reference),
            ("tolerance", f"a constant: float64 failed, {self.unmeasured}" if self.unmeasured else ""),
            ("never run", idle if self.idle else ""),
            ("seconds", ", ".join(f"{n} {s:.1f}" for n, s in self.seconds.items())),
            ("memory", memory_line(self.memory) if self.memory else ""),
        ]
        return [(name, text) for name, text in told if text]

    def _merged_sites(self) -> str:
        """Return in words where the adapters were merged, and what rounding lost there."""
        if not self.merged:
            return "none: the adapter is apart" if self.adapters else ""
        told = f"{len(self.merged)}, {self.merged_bytes:,} B"
        worst = max(self.rounding, key=lambda path: self.rounding[path]["max_rel"], default=None)
        return told if worst is None else f"{told}, rounded by at most {Rounding(**self.rounding[worst])}"

    def _verification(self) -> tuple[str, str]:
        """Return how far ONNX Runtime is from the reference; of rounded weights, how much rounding them costs."""
        shapes = f"at {how_many(len(self.probes), 'unseen shape')}"
        if self.quantized:
            most = max(self.comparisons, key=lambda c: c["max_rel"], default=None)
            lost = "not measured: no output is in floating point"
            if most is not None:
                lost = f"up to {self.max_rel:.1e} of the largest magnitude ({most['output']}), {shapes}"
            return "quantisation's error", lost
        own = "" if self.float32 is None else f"; torch's own rounding is up to {self.float32:.1e} from float64"
        ran = "" if self.verified in ("", "the model") else f" ({self.verified})"
        return "ONNX Runtime = torch", f"to {self.max_abs:.1e} {shapes}{own}{ran}"

    @property
    def in_twin(self) -> bool:
        """Whether a graph is in bfloat16, so that its float32 twin was verified in its place."""
        return TWIN in self.verified

    def __repr__(self) -> str:
        return f"Report({self.model}, {how_many(len(self.adapters), 'adapter')}, {sum(self.bytes.values()):,} B)"

    def __str__(self) -> str:
        return "\n".join([self.model, *(f"  {name}: {text}" for name, text in self.rows())])

    @property
    def max_abs(self) -> float:
        """The largest difference between ONNX Runtime and torch in the verification."""
        return max((c["max_abs"] for c in self.comparisons), default=0.0)

    @property
    def float32(self) -> float | None:
        """The largest difference between torch in the model's own dtype and in float64; None if not measured."""
        noises = [c["float32"] for c in self.comparisons if c["float32"] is not None]
        return max(noises, default=None)

    @property
    def max_rel(self) -> float:
        """The largest difference relative to its output's largest magnitude. For a quantised model, its loss."""
        return max((c["max_rel"] for c in self.comparisons), default=0.0)


def _written(value: object) -> str:
    """Write a value as JSON. A list of objects gets a line for each object, and its numbers have three digits."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = ({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in item.items()} for item in value)
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]"
    return json.dumps(value)


def _few(sizes: Sequence[str]) -> str:
    """Join the first conditions on sizes, and count the others."""
    most = 4
    return "; ".join([*sizes[:most], *([f"and {len(sizes) - most} others"] if len(sizes) > most else [])])


def _first(why: Mapping[str, str], most: int = 3) -> str:
    """Name the first weights with their reasons, and count the others."""
    told = ", ".join(f"{name}: {reason}" for name, reason in list(why.items())[:most])
    return told + (f", and {len(why) - most} others" if len(why) > most else "")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that make an export."""
    import onnxruntime
    import transformers

    from peftfx.version import __version__

    return {
        "peftfx": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
