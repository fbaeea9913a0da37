"""What sites, targets, methods and graphs have, with arguments of its types; read by `mypy --strict`, and not run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

import peftfx
from peftfx.export import Comparison, OnnxModel, VerificationError, export_adapter, export_onnx, verify
from peftfx.graph import TensorSpec
from peftfx.method import (
    AttentionMethod,
    Base,
    Method,
    OverrideMethod,
    PromptMethod,
    Rows,
    SequenceMethod,
    Update,
    Weighted,
    WeightMethod,
    adapter_dtype,
)
from peftfx.passes import Cleanup, Insert, PassManager, Region
from peftfx.runtime import Served, ServedSentences, pipeline
from peftfx.sites import AttentionSite, Call, HeadedSite, Heads, NormSite, Part, SequenceSite, Site, Sites, WeightSite
from peftfx.target import Reason, SelectedSite, Where, explain
from peftfx.testing import CheckReport
from peftfx.vectors import along_channels, along_columns, along_rows, row_index


def looking(sites: Sites, adapted: peftfx.AdaptedModel, inputs: Mapping[str, Tensor]) -> list[str]:
    """What there is to see of sites and of an adapted model."""
    site: Site = sites.by_path("model.layers.0.mlp.up_proj")
    network: nx.DiGraph = sites.network()
    equal: list[tuple[str, ...]] = sites.equal_layers()
    ends: dict[str, str] = sites.layer_ends()
    rows: list[dict[str, Any]] = sites.filter(role="mlp", kind="linear", layer=0).to_dict()
    asked: Where = {"target": "mlp"}
    reasons: list[Reason] = explain(sites, **asked)
    matched: list[SelectedSite | None] = [reason.match for reason in reasons]
    tokens: object = adapted.generate(**inputs, max_new_tokens=4)
    print(network, equal, ends, rows, matched, tokens, adapted.invocations, adapted.print_readable(), sites.table())
    return [one.path for one in sites.renamed(lambda path, kind: f"{kind}.{path}")] + [site.path]


def told(site: Site) -> str:
    """What each kind of site has of its own."""
    calls: tuple[Call, ...] = site.calls
    parts: tuple[Part, ...] = site.parts
    if isinstance(site, HeadedSite):
        heads: Heads = site.heads
        return str(heads)
    if isinstance(site, AttentionSite | NormSite | SequenceSite | WeightSite):
        return site.kind
    return f"{len(calls)} {len(parts)}"


def own_method(method: Method, site: Site, base: Base, x: Tensor) -> Update | None:
    """The contracts of methods, and what they are written with."""
    if isinstance(method, AttentionMethod | OverrideMethod | PromptMethod | SequenceMethod):
        return None
    if isinstance(method, WeightMethod):
        weighted = Weighted(0.5, method, {"lora_A": x})
        print(weighted.weight)
    vector = torch.ones(4, dtype=adapter_dtype(torch.float16))
    rows: Rows = ((0, 2), (4, 6))
    scaled = along_rows(vector, base.weight) * along_columns(vector, base.weight, 1) * along_channels(vector, site)
    return Update(outer=scaled[row_index(rows)])


def serving(adapted: peftfx.AdaptedModel, graph: peftfx.Graph, folder: Path, insert: Insert) -> None:
    """Graphs, exports and what serves them."""
    spec: TensorSpec = graph.inputs[0]
    nodes = [node.name for node in graph.clone().nodes()]
    weight: Tensor = graph.get("base.weight")
    graph.lint()
    print(spec.shape, nodes, weight, graph.text(), PassManager([Cleanup(), insert])(graph), Region)
    try:
        export_onnx(adapted, folder / "model")
        export_adapter(adapted, folder / "model", folder / "adapter")
    except VerificationError as error:
        print(error.what)
    compared: list[Comparison] = verify(folder / "model" / "model.onnx", lambda named: named, [{"x": weight}])
    print([one.max_abs for one in compared])
    served: Served | ServedSentences = peftfx.runtime.load(folder / "model")
    print(served, pipeline(folder / "model", "text-classification"), OnnxModel(folder / "model"))


def checked(cls: type[Method], model: nn.Module, inputs: Mapping[str, Tensor]) -> CheckReport:
    """The laws on a method of one's own."""
    return peftfx.testing.check(cls, model=model, inputs=inputs)
