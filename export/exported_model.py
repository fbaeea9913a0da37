"""export.json: what transformers' `ExportedModel.from_pretrained` reads to run a directory as the model it came from.

It has the forward view alone: for generation transformers wants a graph for prefill and one for each token, with other
names for the cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.exporters.base import EXPORT_MANIFEST_FILE, EXPORT_SCHEMA_VERSION
from transformers.exporters.metadata import ExportMetadata

from peftfx.graph import Graph
from peftfx.passes.base import output_nodes


def write_export_json(directory: Path, file: str, graph: Graph, base: nn.Module, inputs: Mapping[str, object]) -> bool:
    """Write `export.json` for the forward graph in `file`; whether the model is one that transformers can name.

    Args:
        directory: where to.
        file: of the graph.
        graph: that was exported.
        base: its model.
        inputs: keyword arguments that it was captured with.
    """
    if not isinstance(base, PreTrainedModel):
        return False
    _, in_spec = pytree.tree_flatten(((), dict(inputs)))
    metadata = ExportMetadata(
        architecture=type(base).__name__,
        export_dtype=str(base.dtype).removeprefix("torch."),
        export_device="cpu",
        kwargs={name: _described(value) for name, value in inputs.items()},
        in_constants={name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)},
        in_spec=pytree.treespec_dumps(in_spec),
        out_spec=pytree.treespec_dumps(graph.out_spec),
        out_constants=[[i, None] for i, value in enumerate(output_nodes(graph)) if value is None],
    )
    component = {"file": file, "metadata": dataclasses.asdict(metadata)}
    manifest = {"schema_version": EXPORT_SCHEMA_VERSION, "export_format": "onnx", "components": {"model": component}}
    (directory / EXPORT_MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return True


def _described(value: object) -> dict[str, object]:
    if not isinstance(value, torch.Tensor):
        return {"container": type(value).__name__}
    return {"rank": value.ndim, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
