"""The structure of the package: how many files a folder has, who imports whom, and what runs against the layers.

    python tests/house/structure.py                  # the working tree
    python tests/house/structure.py --before REV     # and, ahead of it, another revision

Every import counts: at the top of a file, inside a function, under `TYPE_CHECKING`. The exit code is 1 where a folder
has too many files, an import runs up the layers, or files import each other in a circle.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"peftfx": "peftfx", "peftfx.passes": "passes", "peftfx.export": "export"}  #: packages and their folders
MOST = 15  #: Python files in one folder
UNBOUNDED = ("peftfx/methods",)  #: one file a method, and nothing else

#: From the ground up: a file imports from its own folder, or from a folder that stands before it here.
LAYERS = (
    *("peftfx.version", "peftfx.errors", "peftfx.field_types", "peftfx.options", "peftfx.files", "peftfx.formats"),
    "peftfx.memory",
    "peftfx.telling",
    "peftfx.discovery",
    "peftfx.sharding",
    *(
        "peftfx.pages",
        "peftfx.sites",
        "peftfx.graph",
        "peftfx.quantisation",
        "peftfx.bases",
        "peftfx.caches",
        "peftfx.twins",
        "peftfx.export_options",
    ),
    *("peftfx.analysis", "peftfx.patterns", "peftfx.views", "peftfx.views.finding", "peftfx.generation"),
    *("peftfx.contract", "peftfx.contract.common", "peftfx.contract.common.lora", "peftfx.methods", "peftfx.rules"),
    *("peftfx.adapters", "peftfx.adapters.files", "peftfx.adapters.single_files", "peftfx.pictures"),
    *(
        "peftfx.passes.base",
        "peftfx.passes.properties",
        "peftfx.passes.manager",
        "peftfx.passes.rewriting",
        "peftfx.passes.optimization",
        "peftfx.passes.patterns",
        "peftfx.passes.adaptation",
    ),
    *(
        "peftfx.passes.slots",
        "peftfx.passes.text",
        "peftfx.hosting",
        "peftfx.model.graphs",
        "peftfx.model.processes",
        "peftfx.model",
        "peftfx.serving",
        "peftfx.serving.runs",
    ),
    *("peftfx.export.metadata", "peftfx.export.translation.composing"),
    *("peftfx.export.translation.operators", "peftfx.export.translation"),
    *("peftfx.export.writing", "peftfx.export.coded"),
    *("peftfx.export.verification", "peftfx.export.rounding", "peftfx.export.checkpoint"),
    *("peftfx.export.reports", "peftfx.export.deployment", "peftfx.export.slots", "peftfx.export"),
    "peftfx.export.summaries",
    *("peftfx.training", "peftfx.demo", "peftfx.cli", "peftfx.testing"),
)

#: What hands on names to users and nothing else: on top of all, so that no file of the package imports it.
FACES = frozenset(
    {
        *("peftfx", "peftfx.__main__", "peftfx.cli.__main__", "peftfx.sites", "peftfx.graph"),
        *("peftfx.method", "peftfx.runtime", "peftfx.target", "peftfx.vectors", "peftfx.passes", "peftfx.export"),
    }
)

#: The imports that may run up: `AdaptedModel.export` imports the exporter when it is called, and says what it returns.
SANCTIONED = frozenset(
    ("peftfx.model.adapted", exporter) for exporter in ("peftfx.export.onnx_directory", "peftfx.export.reports.report")
)


@dataclass(frozen=True)
class Structure:
    """The files of a checkout and the imports between them, by the names of modules."""

    files: dict[str, Path]
    imports: nx.DiGraph = field(repr=False)

    @staticmethod
    def of(root: Path) -> Structure:
        """Read from a checkout."""
        files = dict(_modules(root))
        imports = nx.DiGraph()
        imports.add_nodes_from(files)
        for name, path in files.items():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imports.add_edges_from((name, target) for target in _imported(tree, files) if target != name)
        return Structure({name: path.relative_to(root) for name, path in files.items()}, imports)

    def folders(self) -> Counter[str]:
        """How many Python files each folder has."""
        return Counter(str(path.parent) for path in self.files.values())

    def crowded(self) -> dict[str, int]:
        """The folders that have too many."""
        return {name: count for name, count in self.folders().items() if count > MOST and name not in UNBOUNDED}

    def upward(self) -> list[tuple[str, str]]:
        """The imports that run up the layers, or into a face."""
        edges = (edge for edge in self.imports.edges if edge[0] not in FACES and edge not in SANCTIONED)
        return sorted((one, other) for one, other in edges if level(other) > level(one))

    def unplaced(self) -> list[str]:
        """The files that no layer has."""
        return sorted(name for name in self.files if name not in FACES and _layer(name) is None)

    def circles(self) -> list[list[str]]:
        """Files that import each other, directly or through others; the sanctioned imports are left out."""
        graph = self.imports.copy()
        graph.remove_edges_from(SANCTIONED)
        return sorted(sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1)

    def floors(self) -> int:
        """The longest chain of imports, a circle counted once."""
        graph = nx.condensation(self.imports)
        return int(nx.dag_longest_path_length(graph)) + 1


def level(name: str) -> int:
    """How high a module stands; a face, or what no layer has, stands on top."""
    layer = None if name in FACES else _layer(name)
    return len(LAYERS) if layer is None else LAYERS.index(layer)


def _layer(name: str) -> str | None:
    """The layer of a module: its own name, or the folder it lies in."""
    if name in LAYERS:
        return name
    return _layer(name.rpartition(".")[0]) if "." in name else None


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).with_suffix("").parts
            if folder == "peftfx" and inner[0] in ("passes", "export"):
                continue  # links to the folders at the top
            parts = inner[:-1] if inner[-1] == "__init__" else inner
            yield ".".join([package, *parts]), path


def _imported(tree: ast.Module, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module in files:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in files else node.module


def describe(structure: Structure) -> str:
    """What a person wants to know of a structure, a line each."""
    folders = sorted(structure.folders().items(), key=lambda item: -item[1])
    lines = [f"{len(structure.files)} files in {len(folders)} folders, {structure.imports.number_of_edges()} imports"]
    lines += [f"  {count:3d} files in {name}" for name, count in folders]
    lines.append(f"folders with more than {MOST} files: {', '.join(structure.crowded()) or 'none'}")
    circles = structure.circles()
    lines.append(f"circles: {len(circles)}")
    lines += [f"  {' <-> '.join(circle)}" for circle in circles]
    unplaced = structure.unplaced()
    if len(unplaced) > len(structure.files) // 2:
        lines.append("layers: none are stated")
    else:
        lines += [f"in no layer: {name}" for name in unplaced]
        lines.append(f"imports that run up: {len(structure.upward())}")
        lines += [f"  {one} imports {other}" for one, other in structure.upward()]
    lines.append(f"floors: {structure.floors()}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print, and tell by the exit code whether the structure holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REV", help="a revision to print ahead of the working tree")
    revision = parser.parse_args(arguments).before
    if revision:
        with tempfile.TemporaryDirectory() as directory:
            archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", directory], input=archive, check=True)
            print(f"before, {revision}:\n{describe(Structure.of(Path(directory)))}\n\nnow:")
    now = Structure.of(ROOT)
    print(describe(now))
    return int(bool(now.crowded() or now.upward() or now.circles() or now.unplaced()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
