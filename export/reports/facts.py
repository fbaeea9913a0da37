"""What an export adds to its report, from its graphs, its programs and their verification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace

import onnx_ir as ir
from torch import nn

from peftfx.adapters.recipes import Derived, Own, Rounding, foldings
from peftfx.bases.processors.fixed_values import IMAGES_KEY, as_text
from peftfx.export.coded.place import Choice
from peftfx.export.metadata import ENGINE
from peftfx.export.reports.report import TWIN, Report, ToldComparison
from peftfx.export.verification.comparison import Comparison, short_shapes
from peftfx.export.verification.float32_twin import in_bfloat16
from peftfx.export.verification.sizes.limits import Limit
from peftfx.formats import POSITIONS_KEY, SIZES_KEY
from peftfx.generation.anew import computed_anew_beyond
from peftfx.graph.decisions import Decision
from peftfx.graph.graph import DERIVED, Graph
from peftfx.options import FAST
from peftfx.passes.adaptation.constants import Computed
from peftfx.passes.adaptation.prefill import Left
from peftfx.passes.base import attributes_of
from peftfx.passes.optimization.fuse import FUSED
from peftfx.views.decode import Decode
from peftfx.views.finding.image_forward import ForwardWithImages
from peftfx.views.finding.left_out_positions import left_out_positions
from peftfx.views.images.sizes import fixed_images
from peftfx.views.images.videos import Videos
from peftfx.views.images.views import ImageEncoder

_ANYTHING = 1e20  #: a tolerance beyond it refuses only infinities


def add_merged(report: Report, graphs: Sequence[Graph]) -> None:
    """Add the sites at which graphs read merged weights, and what else was folded.

    The rounding of merged weights is added later, when the weights are computed and written.
    """
    merged, folded = set(report.merged), set(report.folded)
    for graph in graphs:
        copies = (name.rpartition(".")[0] for name, recipe in graph.derived.items() if isinstance(recipe, Own))
        merged |= {*foldings(graph.derived.values()), *copies}
        sizes = {n: a.meta["val"].nbytes for n, a in attributes_of(graph).items() if n.startswith(f"{DERIVED}.")}
        own = (name for name, recipe in graph.derived.items() if isinstance(recipe, Derived | Own))
        report.merged_bytes += sum(sizes.get(f"{DERIVED}.{name}", 0) for name in own)
        folded |= {name for name, recipe in graph.derived.items() if isinstance(recipe, Computed | Left)}
    report.merged, report.folded = sorted(merged), sorted(folded)


def add_rounding(report: Report, path: str, rounding: Rounding) -> None:
    """Add the rounding error of a merged weight at a module path."""
    if rounding.max_abs:
        report.rounding[path] = asdict(rounding)


def add_quantized(report: Report, found: Mapping[str, Mapping[str, list[str]]]) -> None:
    """Add which weights were rounded by which scheme, for each graph."""
    report.quantized = {name: [w for weights in by.values() for w in weights] for name, by in found.items()}
    report.schemes = {name: {scheme: len(w) for scheme, w in by.items()} for name, by in found.items()}


def add_codes(report: Report, codes: dict[str, list[Choice]]) -> None:
    """Add how the quantised weights of the base are written, for each graph."""
    report.codes = {graph: found for graph, found in codes.items() if found}


def add_sizes(
    report: Report, program: ir.Model, limits: Sequence[Limit | Decision | str], graph: Graph, prefix: str
) -> None:
    """Add the sizes and sides for which a model is right, to the report and to the model's metadata."""
    told = [*map(str, limits), *fixed_images(graph.inputs)]
    if told:
        program.metadata_props[SIZES_KEY] = "; ".join(told)
        report.sizes += [f"{prefix}{line}" for line in told]


def computed_anew(view: object, base: nn.Module) -> list[str]:
    """Return where the model's class computes its cache anew while it generates, which a graph cannot do by itself."""
    beyond = computed_anew_beyond(base) if isinstance(view, Decode) else None
    if beyond is None:
        return []
    anew = f"where a text grows beyond {beyond} tokens, the model's generate computes its cache anew"
    return [f"{anew}: peftfx.runtime does, and other programs must run the whole text without a past"]


def add_positions(program: ir.Model, view: object, base: nn.Module) -> None:
    """Add to a decode view's metadata how the model's code counts positions that a call leaves out."""
    if (
        isinstance(view, Decode)
        and view.positions
        and not view.rows_of_positions
        and (told := left_out_positions(base))
    ):
        program.metadata_props[POSITIONS_KEY] = told


def add_images(report: Report, program: ir.Model, view: object, prefix: str) -> None:
    """Add the values of images that are constants of their graph, to the report and to the model's metadata.

    In a forward, they are sides of the graph, which refuses other values itself; see `add_sizes`.
    """
    if isinstance(view, ForwardWithImages) and view.compares:
        report.sizes.append(f"{prefix}logits are no numbers where a part of an image is empty, such as a tile of zeros")
    if not isinstance(view, ImageEncoder) or not view.images.reads:
        return
    images = view.images
    counted = (images.counted, images.place) if isinstance(images, Videos) and images.counted else None
    program.metadata_props[IMAGES_KEY] = as_text(images.fixed, images.picture, counted)
    of = ", of a slice of a video" if counted else ""
    report.sizes += [f"{prefix}{value}, as the model's code reads it{of}" for value in images.fixed]


def add_graph(report: Report, graph: Graph, program: ir.Model, found: list[Comparison], prefix: str) -> None:
    """Add a written graph and its comparisons. A prefix distinguishes its names from another graph's names."""
    left_out = {value.name for value in program.graph.inputs if value.is_initializer()}
    report.slots += len(left_out)
    report.inputs |= {prefix + s.name: list(s.shape) for s in graph.inputs if s.name not in left_out}
    report.outputs += [prefix + str(value.name) for value in program.graph.outputs]
    report.opset = max(report.opset, program.opset_imports[""])
    if report.engine in ("", FAST):  # a reason against the fast engine is kept, whichever graph has it
        report.engine = program.metadata_props[ENGINE]
    report.nodes += sum(1 for _ in program.graph)
    whole = Counter(node.op_type for node in program.graph if node.op_type in FUSED)
    report.fused = dict(Counter(report.fused) + whole)
    run = TWIN if in_bfloat16(program) else "the model"
    if parts := max((c.parts for c in found if c.parts > 1), default=0):
        run += f", in {parts} parts"
    if report.verified not in ("", run):  # of another graph of this export
        run = f"{report.verified}; {prefix}{run}"
    report.verified = run
    add_comparisons(report, found, left_out, prefix)


def add_comparisons(
    report: Report, found: Sequence[Comparison], left_out: Collection[str | None], prefix: str = ""
) -> None:
    """Add the comparisons of a graph. The inputs in `left_out` are not listed."""
    for c in found:
        report.unmeasured = report.unmeasured or c.unmeasured
        shapes = short_shapes({name: shape for name, shape in c.shapes.items() if name not in left_out})
        if shapes not in report.probes:
            report.probes.append(shapes)
        bound = c.bound if c.bound < _ANYTHING else None  # a quantised model's outputs only have to be finite
        told = ToldComparison(
            output=prefix + c.output,
            probe=report.probes.index(shapes),
            max_abs=c.max_abs,
            max_rel=c.max_rel,
            bound=bound,
            float32=c.noise,
        )
        report.comparisons.append(told)


def tell_rounding(graph: Graph, tell: Callable[[str, Rounding], None]) -> Graph:
    """Return a copy of a graph that calls `tell` with the rounding of each merged weight when it is computed."""
    derived = {n: replace(r, tell=tell) if isinstance(r, Derived) else r for n, r in graph.derived.items()}
    return replace(graph, derived=derived)
