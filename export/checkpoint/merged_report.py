"""The report of a merge into a transformers directory, returned to the caller and written beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peftfx.adapters.merge_report import MergeReport
from peftfx.adapters.recipes import Rounding
from peftfx.errors import how_many, listed
from peftfx.export.rounding.calibrated import Fitted
from peftfx.export.verification.agreement import Agreement
from peftfx.export.writing.earlier_output import files_in
from peftfx.export.writing.memory import memory_line
from peftfx.formats import REPORT, with_version


@dataclass(frozen=True)
class Difference:
    """The difference between an output of the merged model and that of the base with its unmerged adapter.

    Attributes:
        output: the output's name.
        shapes: the shapes of the inputs.
        max_abs: the largest difference.
        max_rel: the same relative to the output's largest magnitude.
    """

    output: str
    shapes: dict[str, list[int]]
    max_abs: float
    max_rel: float


@dataclass
class MergedReport:
    """The report of a merge into a transformers directory, as written to `peftfx_report.json` there.

    Attributes:
        model: the class of the model.
        methods: the methods of the merged adapter.
        dtype: the dtype of the weights.
        merged: the module paths whose weights the adapter was merged into.
        not_run: those of them that the example call does not run, or whose results it does not use. Their weights are
            compared number by number, and in no call.
        untied: the weights that were tied to another module's before the merge.
        rounding: what each merged weight lost to its dtype: the largest difference `max_abs`, and the same relative to
            the weight's largest value, `max_rel`.
        quantized: the module paths of the rounded weights, by scheme.
        left: why other linear layers were not rounded, by their paths.
        lost: the norm of each weight's rounding error, relative to the weight's norm.
        gptq: what GPTQ did, if it was asked for: see `Report`.
        agreement: how far the rounded model agrees on a text with the base and its unmerged adapter, if the model gives
            logits.
        differences: the outputs of the directory, loaded again, compared with those of the base and its unmerged
            adapter, both computed in float32.
        bytes: the size of each file.
        files: all files that were written, as paths in the directory.
        seconds: wall time of each stage.
        memory: the peak memory of the process in each stage, in bytes, without mapped files. Sampled every 20 ms on
            Linux; empty on other systems.
        versions: the versions of the libraries that made the directory.
    """

    model: str
    methods: list[str] = field(default_factory=list)
    dtype: str = ""
    merged: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    quantized: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    gptq: Fitted | None = None
    agreement: dict[str, Agreement] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def add_merge(self, done: MergeReport) -> None:
        """Add which sites were merged, and which weights were untied."""
        self.merged, self.untied = sorted(done.sites), sorted(done.untied)

    @property
    def max_abs(self) -> float:
        """The largest difference over all outputs."""
        return max((d.max_abs for d in self.differences), default=0.0)

    @property
    def max_rel(self) -> float:
        """The largest difference relative to its output's largest magnitude."""
        return max((d.max_rel for d in self.differences), default=0.0)

    def rows(self) -> list[tuple[str, str]]:
        """Return this report in words, as pairs of a name and a text. Names without a text are left out."""
        worst = max(self.rounding, key=lambda path: self.rounding[path]["max_rel"], default=None)
        rounded = f", rounded by at most {Rounding(**self.rounding[worst])}" if worst is not None else ""
        small = "; ".join(f"{how_many(len(paths), 'weight')} as {kind}" for kind, paths in self.quantized.items())
        most = max(self.lost.values(), default=0.0)
        calls = how_many(len({str(d.shapes) for d in self.differences}), "call")
        told = [
            ("adapter", ", ".join(self.methods) or "none"),
            ("merged sites", f"{len(self.merged)}{rounded}"),
            ("not run", f"{listed(self.not_run, 3)}: no call that is compared uses them" if self.not_run else ""),
            ("untied", ", ".join(self.untied)),
            ("dtype", self.dtype),
            ("quantised", f"{small}, rounded by {most:.1%} of a weight's norm at most" if self.quantized else ""),
            ("GPTQ", str(self.gptq or "")),
            ("not quantised", ", ".join(f"{path}: {why}" for path, why in list(self.left.items())[:3])),
            *(("agreement", str(found)) for found in self.agreement.values()),
            ("files", ", ".join(f"{name} {size:,} B" for name, size in self.bytes.items())),
            (
                "loaded again",
                f"{self.max_abs:.1e} ({self.max_rel:.1e} of the largest) from base and adapter, {calls}",
            ),
            ("seconds", ", ".join(f"{name} {taken:.1f}" for name, taken in self.seconds.items())),
            ("memory", memory_line(self.memory) if self.memory else ""),
        ]
        return [(name, text) for name, text in told if text]

    def __str__(self) -> str:
        return "\n".join([self.model, *(f"  {name}: {text}" for name, text in self.rows())])

    def measure(self, directory: Path) -> None:
        """Add the sizes of the files in a directory."""
        self.bytes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}

    def write(self, directory: Path) -> None:
        """Write `peftfx_report.json` into the directory, as its last file."""
        self.files = [*files_in(directory), REPORT]
        text = json.dumps(with_version(REPORT, asdict(self)), indent=1) + "\n"
        (directory / REPORT).write_text(text, encoding="utf-8")
