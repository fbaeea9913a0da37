"""What a layer costs, by the number of layers: capture, sites, transform, merge, conversion. None should depend on it.

    python benchmarks/growth.py                              # 8, 16, 32, 64, 128 layers; minutes
    python benchmarks/growth.py --view decode                # with the cache in and out
    python benchmarks/growth.py --plot docs/growth.png --json growth.json

A LLaMA of fake weights (they are never made) with a LoRA on all linear layers. CPU time, after a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from checkpoint import Size
from measure import versions

STEPS = ("capture", "sites", "transform", "adapted graph", "merge", "convert")
Costs = dict[str, float]
T = TypeVar("T")


def cost(layers: int, view: str) -> Costs:
    """CPU seconds of each step at so many layers, in one view of the model."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    import peftfx
    from peftfx.analysis.roles import find_sites
    from peftfx.bases.example_inputs import example_inputs
    from peftfx.export.translation.to_onnx import to_onnx
    from peftfx.model.adapted import AdaptedModel
    from peftfx.passes import Merge
    from peftfx.views.capture import capture
    from peftfx.views.finding.named_views import find_view

    costs: Costs = {}

    def timed(step: str, run: Callable[[], T]) -> T:
        gc.collect()
        start = time.process_time()
        value = run()
        costs[step] = time.process_time() - start
        return value

    size = Size(layers, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=300)
    options = {k: v for k, v in size.config().items() if k not in ("model_type", "architectures", "dtype")}
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**options)).eval()
    own = find_view(model, view)
    example = example_inputs(model)
    given, axes = (example, None) if own is None else (own.inputs(model), own.axes)
    base = timed("capture", lambda: capture(model, given, axes=axes, call=own))
    sites = timed("sites", lambda: find_sites(base))
    costs["capture"] -= costs["sites"]  # a capture finds them at its end
    adapted = AdaptedModel.on(model, sites, example, "graph")  # as an export from files
    adapted.graphs.keep(base, given, own)
    adapted.training = False
    timed("transform", lambda: adapted.add_adapter("default", peftfx.LoRA(r=8, target="all-linear")))
    graph = timed("adapted graph", lambda: adapted.graph(view=view))
    merged = timed("merge", lambda: Merge()(graph).graph)
    timed("convert", lambda: to_onnx(merged))
    return costs


def growth(counts: Sequence[int], view: str) -> dict[int, Costs]:
    """The costs at each number of layers, after a run that warms up what is made once in a process."""
    cost(2, view)
    return {layers: cost(layers, view) for layers in counts}


def per_layer(results: Mapping[int, Costs]) -> list[tuple[str, list[float]]]:
    """Milliseconds a layer, for each step and in all."""
    rows = [(step, [1e3 * costs[step] / layers for layers, costs in results.items()]) for step in STEPS]
    return [*rows, ("all", [sum(values) for values in zip(*(values for _, values in rows), strict=True)])]


def plot(results: Mapping[int, Costs], path: Path) -> None:
    """Milliseconds a layer against the number of layers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for step, values in per_layer(results):
        axis.plot(list(results), values, marker="o", label=step, linewidth=2.5 if step == "all" else 1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(results), [str(n) for n in results])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("layers")
    axis.set_ylabel("CPU milliseconds a layer")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--view", choices=["forward", "decode"], default="forward")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = growth(args.layers, args.view)
    from rich.console import Console
    from rich.table import Table

    table = Table("CPU ms a layer", *(f"{n} layers" for n in results), "last / first")
    for step, values in per_layer(results):
        table.add_row(step, *(f"{v:.1f}" for v in values), f"{values[-1] / values[0]:.2f}")
    Console(width=120).print(table)
    print(", ".join(f"{n} {v}" for n, v in versions().items()))
    if args.plot is not None:
        plot(results, args.plot)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
