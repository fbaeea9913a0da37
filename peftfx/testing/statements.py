"""The statements of the laws: functions of a case and a method that raise AssertionError if the law does not hold."""

from __future__ import annotations

import dataclasses
import tempfile
import zlib
from pathlib import Path

import torch
from torch import nn

from peftfx.contract.method import Method
from peftfx.contract.placed import SHARED
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.export.translation.to_onnx import to_onnx
from peftfx.export.writing.weights import save
from peftfx.graph.graph import ADAPTERS
from peftfx.graph.rewriter import OVERRIDES
from peftfx.passes.adaptation.evaluate import Evaluate
from peftfx.passes.adaptation.insert import Insert
from peftfx.passes.adaptation.merge import Merge
from peftfx.passes.adaptation.remove import Remove
from peftfx.passes.manager import PassManager
from peftfx.serving.onnx_model import OnnxModel
from peftfx.testing.cases import Case
from peftfx.testing.pool import captured
from peftfx.testing.setup import LOOSE, adapt, assert_close, assert_untouched, bare_case, output, snapshot, stir


@torch.no_grad()
def neutral(case: Case, method: Method) -> None:
    """A new adapter changes no output, unless its method declares that it is not neutral."""
    if not method.neutral:
        return
    adapted, inputs = adapt(case, method, stirred=False), case.inputs()
    with adapted.disable_adapter():
        want = output(adapted, inputs)
    assert_close(output(adapted, inputs), want, LOOSE[case.spec.dtype], "with a new adapter")


@torch.no_grad()
def merge(case: Case, method: Method) -> None:
    """The merged graph equals the adapted graph, reads no adapter except overrides, and merging changes no weight."""
    adapted, before = adapt(case, method), snapshot(captured(case.spec).model)
    inputs = tuple(case.inputs().values())
    graph = adapted.graph()
    merged = PassManager([Merge(), Evaluate()], check="metadata")(graph).graph
    (want, *_), (got, *_) = graph.run(*inputs), merged.run(*inputs)
    assert_close(got, want, LOOSE[case.spec.dtype], "merged")
    read = [n for n in merged.nodes() if n.op == "get_attr" and str(n.target).startswith(f"{ADAPTERS}.")]
    assert all(OVERRIDES in n.meta for n in read), f"still read: {read}"
    assert_untouched(adapted.base, before)


@torch.no_grad()
def merge_in_place(case: Case, method: Method) -> None:
    """A base after `merge` equals the adapted model, as a graph and as modules; or the merge is refused."""
    adapted, before, inputs = adapt(case, method), snapshot(captured(case.spec).model), case.inputs()
    want = output(adapted, inputs)
    try:
        adapted.merge()
    except PeftfxError:  # a module whose code reads no bias cannot get one
        assert_untouched(adapted.base, before)
        return
    assert adapted.names() == ()
    assert_close(output(adapted, inputs), want, LOOSE[case.spec.dtype], "captured again")
    assert_close(output(adapted.remove(), inputs), want, LOOSE[case.spec.dtype], "run eagerly")


@torch.no_grad()
def remove(case: Case, method: Method) -> None:
    """Removing an inserted adapter restores the graph's text, the state and the outputs exactly."""
    adapted, before = bare_case(case), snapshot(captured(case.spec).model)
    grads = {name: p.requires_grad for name, p in captured(case.spec).model.named_parameters()}
    base, inputs = adapted.graph(), tuple(case.inputs().values())
    want = base.run(*inputs)
    text = base.text()
    adapted.add_adapter("default", method, seed=case.seed)
    stir(adapted.adapter("default"), case.seed)
    output(adapted, case.inputs())
    if method.targeted:  # a prompt acts in a separate graph, captured through its entry
        removed = Remove()(adapted.graph()).graph
        removed.lint()
        assert removed.text() == text == base.text()
        assert all(torch.equal(a, b) for a, b in zip(removed.run(*inputs), want, strict=True))
    model = adapted.remove()
    assert_untouched(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert torch.equal(output(adapted, case.inputs()), want[0])


def remove_one(case: Case, method: WeightMethod) -> None:
    """Removing one of two inserted adapters leaves the same graph as inserting only the other one."""
    method = dataclasses.replace(method, modules_to_save=None)
    adapted = bare_case(case)
    inserts = {}
    for name in ("first", "second"):
        adapted.add_adapter(name, method, seed=case.seed)
        inserts[name] = Insert(name, adapted.adapter(name))
    first = adapted.adapter("first")
    if first.overrides:
        return  # two adapters cannot both replace one tensor of the base
    linked = adapted.graph(adapted=False).clone()
    linked.module.add_module(ADAPTERS, adapted.adapters)
    both = inserts["second"](inserts["first"](linked).graph).graph
    for gone, left in (("first", "second"), ("second", "first")):
        removed = Remove(gone)(both).graph
        removed.lint()
        assert removed.text() == inserts[left](linked).graph.text(), f"without {gone}"


@torch.no_grad()
def idempotence(case: Case, method: Method) -> None:
    """Merging, evaluating or removing twice, or transforming again with the same seed, changes nothing."""
    adapted, again, inputs = adapt(case, method), adapt(case, method), case.inputs()
    assert adapted.graph().text() == again.graph().text()
    assert torch.equal(output(adapted, inputs), output(again, inputs)), "another adapter from the same seed"
    merged = Merge()(adapted.graph()).graph
    for step, graph in (
        (Merge(), merged),
        (Evaluate(), Evaluate()(merged).graph),
        (Remove(), Remove()(again.graph()).graph),
    ):
        result = step(graph)
        assert (result.changed, result.graph.text()) == (0, graph.text()), f"{step} twice"


@torch.no_grad()
def commute(case: Case, method: Method) -> None:
    """Rules at different places give the same outputs and the same merged weights in either order."""
    assert isinstance(method.target, tuple)
    targets = method.target
    rules = [dataclasses.replace(method, target=part) for part in (targets[:1], targets[1:])]
    one = adapt(case, method)
    if len({p.site.path for p in one.adapter("default").placements}) < len(targets):
        return  # two of the places belong to one site
    results = []
    for order in (rules, rules[::-1]):
        adapted = adapt(case, *order)
        for name, value in adapted.adapter("default").tensors():
            if not name.startswith(f"{SHARED}."):
                whole = one.adapter("default").get(name)
                if whole.shape != value.shape:
                    return  # the sizes of a place depend on the other places of its rule (`Method.counted`)
                value.copy_(whole)
            elif isinstance(value, nn.Parameter):  # each rule has shared tensors of its own: seeded by its target
                _, number, leaf = name.split(".")
                rng = torch.Generator().manual_seed(zlib.crc32(f"{order[int(number)].target} {leaf}".encode()))
                value.copy_(torch.randn(value.shape, generator=rng))
        merged = Merge()(adapted.graph()).graph
        weights = sorted(name for name in merged.derived if SHARED not in name)  # those have the rules' numbers
        results.append([output(adapted, case.inputs()), *(merged.get(f"derived.{name}") for name in weights)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def save_and_load(case: Case, method: Method) -> None:
    """A saved adapter that is loaded onto another base gives the same outputs; a method without a format is refused."""
    adapted, other = adapt(case, method), bare_case(case)
    with tempfile.TemporaryDirectory() as directory:
        try:
            adapted.save_pretrained(directory)
        except PeftfxError:
            assert not list(Path(directory).iterdir()), "refused, and written all the same"
            return
        other.load_adapter(directory, "default")
    with torch.no_grad():
        assert_close(output(other, case.inputs()), output(adapted, case.inputs()), LOOSE[case.spec.dtype], "loaded")


@torch.no_grad()
def sizes(case: Case, method: Method) -> None:
    """At sizes that the capture never saw, each row of a batch equals that row alone, if the method can be folded."""
    if method.unfoldable:
        return
    adapted, inputs = adapt(case, method), case.inputs()
    whole = output(adapted, inputs)
    for i in range(case.batch):
        alone = output(adapted, {name: t[i : i + 1] for name, t in inputs.items()})
        assert_close(whole[i : i + 1], alone, LOOSE[case.spec.dtype], f"row {i}")


def roads(case: Case, method: Method) -> None:
    """The modules road and the graph road give equal outputs and gradients, in train and in eval mode."""
    for training in (True, False):
        adapted = adapt(case, method, training=training)
        placed = adapted.adapter("default").placements
        apart = placed.attentions or placed.patterns or "reflect" in repr(case.spec)
        assert adapted.road == "modules" or apart, adapted.obstacle
        found = []
        for road in ("modules", "graph") if adapted.road == "modules" else ():
            adapted.wanted = road
            adapted.zero_grad()
            torch.manual_seed(case.seed)
            given = output(adapted, case.inputs())
            given.float().square().sum().backward()
            trained = {name: p.grad for name, p in adapted.adapter("default").named_parameters()}
            found.append({"the output": given.detach(), **trained})
        for name, want in found[1].items() if found else ():
            got = found[0][name]
            assert (got is None) == (want is None), f"a gradient of {name} on one road alone"
            if got is None or want is None:  # this method's options do not read it
                continue
            assert_close(got, want, LOOSE[case.spec.dtype], f"{name} by the two roads")


@torch.no_grad()
def onnx(case: Case, method: Method) -> None:
    """ONNX Runtime gives the outputs of the graph: of the adapted or the merged graph, depending on the seed.

    The merged graph is also taken if ONNX has no operator for what a method computes from its parameters, such as an
    inverse.
    """
    adapted, inputs = adapt(case, method), case.inputs()
    merged = Merge()(adapted.graph()).graph
    try:
        model = to_onnx(merged if case.seed % 2 else adapted.graph())
    except PeftfxError:
        model = to_onnx(merged)
    with tempfile.TemporaryDirectory() as directory:
        save(model, Path(directory))
        got = next(iter(OnnxModel(directory, threads=1)(**inputs).values()))
    assert_close(got, output(adapted, inputs), LOOSE["float32"], "in ONNX Runtime")
