"""Write `export.json`, which transformers' `ExportedModel.from_pretrained` reads to run an exported directory.

The file describes only the forward view. For generation, transformers expects one graph for the prompt and another for
each further token, with other names for the cache.
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

from peftfx.errors import first_line
from peftfx.graph.graph import Graph
from peftfx.passes.base import output_nodes

_PLAIN = (bool, int, float, str)


def write_export_json(directory: Path, file: str, graph: Graph, base: nn.Module, inputs: Mapping[str, object]) -> str:
    """Write `export.json` for the forward graph in `file`, if transformers can name what the model takes and returns.

    Return why it was not written; empty if it was, or if the model is not one of transformers.

    Args:
        directory: the directory to write to.
        file: the file name of the graph.
        graph: the exported graph.
        base: the graph's model.
        inputs: the keyword arguments that the graph was captured with.
    """
    if not isinstance(base, PreTrainedModel):
        return ""
    _, in_spec = pytree.tree_flatten(((), dict(inputs)))
    try:
        named_in, named_out = pytree.treespec_dumps(in_spec), pytree.treespec_dumps(graph.out_spec)
    except NotImplementedError as error:  # transformers cannot name a type of the model's own
        return f"transformers has no name for a type that the model takes or returns: {first_line(error)}"
    metadata = ExportMetadata(
        architecture=type(base).__name__,
        export_dtype=str(base.dtype).removeprefix("torch."),
        export_device="cpu",
        kwargs={name: _described(value) for name, value in inputs.items()},
        in_constants={name: value for name, value in inputs.items() if isinstance(value, _PLAIN)},
        in_spec=named_in,
        out_spec=named_out,
        out_constants=[[i, None] for i, value in enumerate(output_nodes(graph)) if value is None],
    )
    component = {"file": file, "metadata": dataclasses.asdict(metadata)}
    manifest = {"schema_version": EXPORT_SCHEMA_VERSION, "export_format": "onnx", "components": {"model": component}}
    (directory / EXPORT_MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return ""


def _described(value: object) -> dict[str, object]:
    if not isinstance(value, torch.Tensor):
        return {"container": type(value).__name__}
    return {"rank": value.ndim, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
