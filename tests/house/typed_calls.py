"""Every public call with arguments of its types. It is not run: `mypy --strict` reads it, as an editor does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import peftfx
from peftfx.export import OnnxModel, Report, to_onnx, verify
from peftfx.method import Base, Op, Params, WeightMethod
from peftfx.passes import (
    Evaluate,
    Fuse,
    Insert,
    Merge,
    Pass,
    PassManager,
    PassResult,
    Probe,
    Remove,
    Rewrite,
    Sweep,
    parse_pass,
)
from peftfx.sites import Site, Sites
from peftfx.target import explain, select


@dataclass(frozen=True, kw_only=True)
class Scale(WeightMethod):
    """A method of one's own."""

    peft_type: ClassVar[str] = "SCALE"
    default_target: ClassVar[str] = "mlp"

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"scale": torch.ones_like(base.weight[:, 0])}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return y * p["scale"]

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(base.weight * p["scale"][:, None], base.bias)

    def keys(self, site: Site) -> dict[str, str]:
        return {"scale": "scale"}


def adapting(model: nn.Module, inputs: Mapping[str, object], folder: Path) -> peftfx.AdaptedModel:
    """transform, load, inspect, plan, register, and what they give."""
    peftfx.register(Scale)
    sites: Sites = peftfx.inspect(model, inputs=inputs)
    total: int = peftfx.plan(model, [peftfx.LoRA(r=4), "ia3@mlp.down"], inputs=inputs).parameters
    roles: int = sites.roles()["mlp"] + total
    matched: list[str] = [match.site.path for match in sites.select("mlp") + select(sites, target="mlp")]
    why: list[str] = [reason.why for reason in explain(sites, target="mlp")]
    sites.show().save(folder / f"{roles}{len(matched + why)}.html")
    adapted: peftfx.AdaptedModel = peftfx.transform(model, Scale(), "mine", inputs=inputs, seed=0, road="modules")
    adapted = peftfx.load(model, folder, "theirs", inputs=inputs)
    adapted.add_adapter("more", peftfx.IA3(), seed=1)
    adapted.load_adapter(folder, "again")
    adapted.set_adapter(["more", "again"])
    names: tuple[str, ...] = adapted.names() + adapted.active
    with adapted.disable_adapter():
        adapted(**inputs)
    adapted.add_weighted_adapter(["more", "again"], [0.5, 0.5], "both", combination_type="linear")
    adapted.convert_to_lora("more", 8, "lora")
    trained, every = adapted.get_nb_trainable_parameters()
    adapted.print_trainable_parameters()
    adapted.update_and_allocate(trained + every + len(names))
    adapted.save_pretrained(folder, "more")
    state: dict[str, Tensor] = peftfx.get_peft_model_state_dict(adapted, "more")
    peftfx.set_peft_model_state_dict(adapted, state, "more")
    peftfx.hotswap_adapter(adapted, folder, "more")
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    adapted.show().save(folder / "page.html")
    return adapted


def passing(model: nn.Module, adapted: peftfx.AdaptedModel, inputs: Mapping[str, Tensor]) -> peftfx.Graph:
    """capture, graphs, passes, patterns."""
    graph: peftfx.Graph = peftfx.capture(model, inputs)
    again: peftfx.Graph = adapted.graph(inputs, adapted=False, view="forward", exact=True)

    @peftfx.pattern("activation.relu", x="batch width")
    def relu(x: Tensor) -> Tensor:
        return torch.relu(x)

    found: peftfx.Pattern = relu
    told: list[str] = [near.why for near in found.explain(again)]
    steps: list[Pass] = [Merge(), Evaluate(), Rewrite(found, torch.sigmoid), Probe(found), Sweep(), Fuse()]
    steps += [Insert("more", adapted.adapter("more")), Remove("more"), parse_pass("Merge")]
    result: PassResult = PassManager(steps, check="lint")(graph)
    outputs: list[Tensor] = result.graph.run(*inputs.values())
    assert len(outputs) == len(result.graph.outputs) + len(told)
    return result.graph


def exporting(adapted: peftfx.AdaptedModel, graph: peftfx.Graph, folder: Path) -> None:
    """Exports, and what serves them."""
    asked = peftfx.ExportOptions(view="decode", optimize="cpu")
    report: Report = adapted.export(folder / "a", asked, force=True)
    report = peftfx.export_onnx(adapted, folder / "b", view="forward", slots="all-linear")
    file: Path = peftfx.export_adapter(adapted, folder / "b", folder / "c")
    served = peftfx.runtime.load(folder / "b", threads=2, adapter=file)
    served.load_adapter(file)
    model = OnnxModel(folder / "a")
    difference: float = report.max_abs
    to_onnx(graph, opset=23)
    print(difference, model.inputs, verify, peftfx.__version__)


def training(adapted: peftfx.AdaptedModel) -> None:
    """What goes with transformers' Trainer; the laws; errors."""
    callbacks = [peftfx.RankAllocation(), peftfx.MemoryInLogs(), peftfx.AdapterInCheckpoints()]
    print(callbacks, peftfx.testing.check(Scale))
    try:
        adapted.merge()
    except peftfx.PeftfxError as error:
        told: tuple[str, str, str] = (error.what, error.where, error.hint)
        print(told)
