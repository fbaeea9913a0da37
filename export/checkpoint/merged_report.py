"""MergedReport: what a merge into a transformers directory did, told to the caller and kept beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peftfx.adapters.merge_report import MergeReport
from peftfx.adapters.recipes import Rounding
from peftfx.export.rounding.calibrated import Fitted
from peftfx.export.verification.agreement import Agreement
from peftfx.export.writing.memory import memory_line
from peftfx.formats import REPORT, with_version


@dataclass(frozen=True)
class Difference:
    """How far an output of the merged model is from that of the base with its adapter beside it.

    Attributes:
        output: its name.
        shapes: of the inputs.
        max_abs: the largest difference.
        max_rel: the same over the output's largest magnitude.
    """

    output: str
    shapes: dict[str, list[int]]
    max_abs: float
    max_rel: float


@dataclass
class MergedReport:
    """What a merge into a transformers directory did, as it is written to `peftfx_report.json` there.

    Attributes:
        model: the class of the model.
        methods: of the adapter that was merged.
        dtype: of the weights.
        merged: the module paths whose weights it went into.
        untied: weights that another module shared until now.
        rounding: what each merged weight lost to its dtype, `max_abs` and, of its largest value, `max_rel`.
        quantized: the module paths of weights that were rounded, by what to.
        left: why other linear layers were not, by their paths.
        lost: what rounding took away from each weight, over its norm.
        gptq: what GPTQ did, where it was asked for: see `Report`.
        agreement: how far the rounded model agrees with the base with its adapter beside it on a text, where it has
            logits.
        differences: outputs of the directory, loaded again, against the base as it is with the adapter beside it, both
            computed in float32.
        bytes: size of each file.
        seconds: wall time of each stage.
        memory: the most that the process had in each stage, in bytes, beyond files that are mapped: looked at every
            20 ms, on Linux; elsewhere empty.
        versions: of the libraries that made it.
    """

    model: str
    methods: list[str] = field(default_factory=list)
    dtype: str = ""
    merged: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    quantized: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    gptq: Fitted | None = None
    agreement: dict[str, Agreement] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def add_merge(self, done: MergeReport) -> None:
        """Add which sites were merged."""
        self.merged, self.untied = sorted(done.sites), sorted(done.untied)

    @property
    def max_abs(self) -> float:
        """The largest difference of an output."""
        return max((d.max_abs for d in self.differences), default=0.0)

    @property
    def max_rel(self) -> float:
        """The largest difference over its output's largest magnitude."""
        return max((d.max_rel for d in self.differences), default=0.0)

    def rows(self) -> list[tuple[str, str]]:
        """This report in words, line by line."""
        worst = max(self.rounding, key=lambda path: self.rounding[path]["max_rel"], default=None)
        rounded = f", rounded by at most {Rounding(**self.rounding[worst])}" if worst is not None else ""
        small = "; ".join(f"{len(paths)} weights as {kind}" for kind, paths in self.quantized.items())
        most = max(self.lost.values(), default=0.0)
        calls = len({str(d.shapes) for d in self.differences})
        return [
            ("adapter", ", ".join(self.methods) or "none"),
            ("merged sites", f"{len(self.merged)}{rounded}"),
            *([("untied", ", ".join(self.untied))] if self.untied else []),
            ("dtype", self.dtype),
            *([("quantised", f"{small}, rounded by {most:.1%} of a weight's norm at most")] if self.quantized else []),
            *([("GPTQ", str(self.gptq))] if self.gptq is not None else []),
            ("not quantised", ", ".join(f"{path}: {why}" for path, why in list(self.left.items())[:3])),
            *(("agreement", str(found)) for found in self.agreement.values()),
            ("files", ", ".join(f"{name} {size:,} B" for name, size in self.bytes.items())),
            (
                "loaded again",
                f"{self.max_abs:.1e} ({self.max_rel:.1e} of the largest) from base and adapter, {calls} calls",
            ),
            ("seconds", ", ".join(f"{name} {taken:.1f}" for name, taken in self.seconds.items())),
            *([("memory", memory_line(self.memory))] if self.memory else []),
        ]

    def __str__(self) -> str:
        return "\n".join([self.model, *(f"  {name}: {text}" for name, text in self.rows() if text)])

    def measure(self, directory: Path) -> None:
        """Add the sizes of the files."""
        self.bytes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}

    def write(self, directory: Path) -> None:
        """Put `peftfx_report.json` into the directory."""
        text = json.dumps(with_version(REPORT, asdict(self)), indent=1) + "\n"
        (directory / REPORT).write_text(text, encoding="utf-8")
