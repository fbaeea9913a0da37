"""Report: what an export did, told to the caller and kept beside the model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch

from peftfx.adapted import AdaptedModel
from peftfx.derived import foldings
from peftfx.export.onnx import ENGINE, FAST
from peftfx.export.twin import in_bfloat16
from peftfx.export.verify import Comparison
from peftfx.graph import Graph
from peftfx.passes.freeze import Computed

REPORT = "peftfx_report.json"


@dataclass
class Report:
    """What an export did, as it is written to `peftfx_report.json` in its directory.

    Attributes:
        model: the class of the base model.
        adapters: what was exported with it: name, method, and the number of its parameters.
        merged: the module paths whose weights the adapters were merged into; empty where they were left apart.
        folded: what else became a constant of the graph: soft prompts, whatever they were computed from.
        inputs, outputs: of the ONNX model, with their shapes; those of one of several as `decoder_model.logits`.
        opset: version of the ONNX operators.
        engine: the road to ONNX that was taken; where it is not the one asked for, why.
        nodes: in the ONNX graph.
        bytes: size of each file.
        seconds: wall time of each stage.
        verified: what ONNX Runtime ran: the model, or its float32 twin over the same weights.
        comparisons: the verification, output by output at each shape.
        versions: of the libraries that made it.
    """

    model: str
    adapters: list[dict[str, object]] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    inputs: dict[str, list[int | str]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    opset: int = 0
    engine: str = FAST
    nodes: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    verified: str = ""
    comparisons: list[dict[str, object]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, adapted: AdaptedModel) -> Report:
        """A report that names the model, its active adapters, and the libraries."""
        adapters: list[dict[str, object]] = [
            {
                "name": name,
                "methods": [type(rule).__name__ for rule in adapted.adapter(name).rules],
                "parameters": sum(p.numel() for p in adapted.adapter(name).parameters()),
            }
            for name in adapted.active
        ]
        return cls(type(adapted.base).__name__, adapters, versions=_versions())

    def add_merged(self, graph: Graph) -> None:
        """Add the sites that a graph reads merged weights at, and what else was folded."""
        self.merged = sorted({*self.merged, *foldings(graph.derived.values())})
        folded = (name for name, recipe in graph.derived.items() if isinstance(recipe, Computed))
        self.folded = sorted({*self.folded, *folded})

    def describe(self, graph: Graph, program: ir.Model, found: list[Comparison], prefix: str = "") -> None:
        """Add a graph that was written, and how it compared; a prefix tells its names from those of another graph."""
        self.inputs |= {prefix + spec.name: list(spec.shape) for spec in graph.inputs}
        self.outputs += [prefix + str(value.name) for value in program.graph.outputs]
        self.opset = program.opset_imports[""]
        if self.engine in ("", FAST):  # what one graph could not have is worth more than what the other had
            self.engine = program.metadata_props[ENGINE]
        self.nodes += sum(1 for _ in program.graph)
        self.verified = "its float32 twin, over the same weights" if in_bfloat16(program) else "the model"
        self.comparisons += [
            {
                "output": prefix + c.output,
                "shapes": {name: list(shape) for name, shape in c.shapes.items()},
                "max_abs": c.max_abs,
                "max_rel": c.max_rel,
            }
            for c in found
        ]

    def measure(self, directory: Path) -> None:
        """Add the sizes of the files."""
        self.bytes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}

    def write(self, directory: Path) -> None:
        """Put `peftfx_report.json` into the directory."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (directory / REPORT).write_text(text, encoding="utf-8")

    @property
    def max_abs(self) -> float:
        """The largest difference between ONNX Runtime and torch that verification saw."""
        return max((float(str(c["max_abs"])) for c in self.comparisons), default=0.0)


def _versions() -> dict[str, str]:
    import onnxruntime
    import transformers

    from peftfx.version import __version__

    return {
        "peftfx": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
