"""Nodes are made in one place: nobody else calls fx's own makers, or writes into a node's `meta`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from house.structure import PACKAGES, ROOT

MAKERS = {
    "create_node",
    "call_function",
    "call_method",
    "call_module",
    "get_attr",
    "placeholder",
    "node_copy",
    "graph_copy",
}
#: Beside the Rewriter itself: what copies a whole graph with all its values; and what names modules in a graph that
#: torch.export has just made, as none of ours; and what copies layers while torch.export makes its graph.
SANCTIONED = {
    *("peftfx/graph/rewriter.py", "peftfx/graph/graph.py", "peftfx/graph/places.py"),
    "peftfx/graph/capturing/traced_layers.py",
}
#: Keys of the `meta` of values and tensors of an ONNX program, which are no nodes of fx.
ONNX = {"SOURCE", "PERMUTED", "PIECES"}


def wrong(tree: ast.Module) -> Iterator[str]:
    """The lines of a file that make nodes, or write what a Rewriter writes."""
    made_by = {"rewriter", "at"}  # names of a Rewriter and its cursors
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
            owner = ast.unparse(node.func.value).rpartition(".")[2]
            if owner not in made_by:
                yield f"{node.lineno}: {ast.unparse(node.func)}"
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Subscript) and ast.unparse(target.slice) not in ONNX:
                target = target.value
            if isinstance(target, ast.Attribute) and target.attr == "meta":
                yield f"{node.lineno}: {ast.unparse(target)} is assigned"


def test_nodes_are_made_by_the_rewriter_alone() -> None:
    found = []
    for folder in PACKAGES.values():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name not in SANCTIONED:
                found += [f"{name}:{line}" for line in wrong(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == [], "use `peftfx.graph.rewriter.Rewriter`"


def test_a_node_made_by_hand_is_seen() -> None:
    text = "graph.call_function(f)\nnode.meta['val'] = 1\nnode.meta = {}\nvalue.meta[SOURCE] = 2\nat.call_function(x)"
    seen = sorted(wrong(ast.parse(text)))
    assert seen == ["1: graph.call_function", "2: node.meta is assigned", "3: node.meta is assigned"]
