"""Translate a graph to an ONNX model whose weights are read when the model is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from peftfx.analysis.weight_ops import module_path
from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.export.metadata import ENGINE, PERMUTED, PIECES, SOURCE
from peftfx.export.translation.complex_pairs import pair_tensors
from peftfx.export.translation.layout import name_apart, store_transposed, tidy
from peftfx.export.translation.operators.admitted import cast_where_not_admitted
from peftfx.export.translation.operators.recurrent_layers import refuse_recurrent_layers
from peftfx.export.translation.program import Translation
from peftfx.export.translation.scopes import put_rest
from peftfx.export.translation.stamped import translate
from peftfx.export.translation.torch_exporter import retrace
from peftfx.graph.capturing.sizes.free_sizes import checks_of_sizes
from peftfx.graph.graph import ADAPTERS, BASE, CONSTANTS, DERIVED, Graph
from peftfx.graph.lazy_weights import load_contiguous, pieces
from peftfx.options import CPU, FAST, NONE, TORCH, check_engine, check_opset, check_optimize
from peftfx.version import __version__

_Weights = Callable[[str], torch.Tensor]


def to_onnx(
    graph: Graph, *, opset: int | None = None, weights: _Weights | None = None, engine: str = FAST, optimize: str = CPU
) -> ir.Model:
    """Translate `graph` to ONNX without reading a weight.

    Inputs, outputs and free sizes have the graph's own names. Initializers have the names of the module's parameters
    (`transformer.wte.weight`), and adapters' tensors keep their `adapters.` prefix. A derived weight takes the name of
    the parameter that it replaces, with the suffix `.merged` if both are used. A weight that the graph only uses
    transposed is stored transposed: see `store_transposed`.

    Args:
        graph: what to translate, captured in eval mode.
        opset: the version of the ONNX operators; by default the version that torch's exporter prefers, or that
            `optimize` needs.
        weights: reads the tensor of a `get_attr` target of the graph, at write time; by default from the graph itself.
            With this argument, a graph captured on fake tensors can be written.
        engine: `fast` translates each distinct operation once; `torch` traces and decomposes the whole graph, as
            torch.onnx does. If the fast engine cannot translate a graph, the torch engine does. The model's metadata
            say which engine was used, and why.
        optimize: `cpu` uses ONNX's own operators for whole attentions, rotary embeddings and RMS norms (opset 23; see
            `peftfx.passes.Fuse`), if the fast engine translates the graph; `none` does not fuse. `cuda` gives the same
            graph as `cpu`: ONNX Runtime's CUDA provider has kernels for these operators in float32, float16 and
            bfloat16; those of `Attention` since 1.25, and for grouped heads since 1.26.

    Raises:
        PeftfxError: the graph was captured in training mode, takes or gives complex numbers, or has an operator without
            a translation or a kernel.
    """
    check_opset(opset)
    check_engine(engine)
    check_optimize(optimize)
    if graph.training:
        hint = "call model.eval() and capture again"
        raise PeftfxError("a graph captured in training mode cannot be served", "", hint)
    _refuse_complex(graph)
    refuse_recurrent_layers(graph)
    graph = pair_tensors(graph)
    with checks_of_sizes():
        translation, went = _translate(graph, opset, engine, optimize)
    model = translation.model
    tidy(model)
    _bind(model, translation, graph, _reader(graph, weights or graph.get))
    store_transposed(model)
    put_rest(model)
    cast_where_not_admitted(model)
    _name_interface(model, graph, translation)
    name_apart(model)
    model.metadata_props[ENGINE] = went
    model.producer_name, model.producer_version = "peftfx", __version__
    return model


def _refuse_complex(graph: Graph) -> None:
    """Refuse inputs and outputs of complex numbers, which no runtime takes."""
    *_, last = graph.nodes()
    given = [(spec.name, spec.dtype) for spec in graph.inputs]
    values = (node.meta.get("val") if isinstance(node, fx.Node) else None for node in pytree.tree_leaves(last.args))
    made = ((name, v.dtype) for name, v in zip(graph.outputs, values, strict=True) if isinstance(v, torch.Tensor))
    for name, dtype in (*given, *made):
        if dtype.is_complex:
            hint = "take or return torch.view_as_real(...): the real and the imaginary parts"
            raise PeftfxError("ONNX has no inputs and outputs of complex numbers", name, hint)


def _translate(graph: Graph, opset: int | None, engine: str, optimize: str) -> tuple[Translation, str]:
    went = engine
    if engine == FAST:
        try:
            return translate(graph, opset, fused=optimize != NONE), FAST
        except PeftfxError:
            raise
        except Exception as error:  # the exporter's parts raise various errors: torch's own road is tried next
            raise_if_memory_is_out(error)
            went = f"{TORCH} (the fast one does not take {first_line(error.__cause__ or error)})"
    try:
        return retrace(graph, opset), went
    except PeftfxError:
        raise
    except Exception as error:
        raise_if_memory_is_out(error)
        raise _untranslated(graph, first_line(error.__cause__ or error)) from error


def _untranslated(graph: Graph, said: str) -> PeftfxError:
    """Return the error for a graph that the exporter cannot translate. It names the operator and the module, if known.

    Args:
        graph: the graph.
        said: what the exporter says.
    """
    base = type(graph.base).__name__
    operator = re.search(r"target=torch\.ops\.\w+\.(\w+)\.", said)
    if operator is None:
        hint = "see `__cause__` (on the command line: --verbose) for the exporter's own report"
        return PeftfxError(f"no translation to ONNX: {said}", base, hint)
    name = operator[1].strip("_")
    called = ((n, str(n.target).partition(".")[2].partition(".")[0]) for n in graph.nodes() if n.op == "call_function")
    # The exporter may have split the operator up: linalg_inv is linalg_inv_ex there.
    node = next((n for n, own in called if own and name.startswith(own.strip("_"))), None)
    what = f"torch's {name} has no translation to ONNX"
    return PeftfxError(what, (node and module_path(node)) or base, "compute it by other operators in the model's code")


def _bind(model: ir.Model, translation: Translation, graph: Graph, weights: _Weights) -> None:
    """Give each initializer its final name, and a tensor that is read when it is written."""
    found = {name: value for name, value in model.graph.initializers.items() if name in translation.targets}
    for name in found:  # before any has its final name, which may be the one that another has until then
        del model.graph.initializers[name]
    taken = {spec.name for spec in graph.inputs} | set(translation.outputs) | set(model.graph.initializers)
    # Base weights first: a derived weight takes a base weight's name only if that is free.
    order = sorted(found, key=lambda name: translation.targets[name].startswith(f"{DERIVED}."))
    for buffer in order:
        target, value = translation.targets[buffer], found[buffer]
        value.name = _initializer_name(target, taken)
        taken.add(value.name)
        value.const_value = _lazy(value, target, weights)
        if not target.startswith(f"{CONSTANTS}."):  # constants belong to one graph
            value.meta[SOURCE] = target
        model.graph.initializers[value.name] = value


def _initializer_name(target: str, taken: Iterable[str]) -> str:
    root, _, name = target.partition(".")
    plain = target if root == ADAPTERS else name
    if plain not in taken:
        return plain
    suffix = {DERIVED: "merged", CONSTANTS: "constant", BASE: "weight"}.get(root, "tensor")
    name, count = f"{plain}.{suffix}", 2
    while name in taken:
        name, count = f"{plain}.{suffix}{count}", count + 1
    return name


def _lazy(like: ir.Value, target: str, weights: _Weights) -> ir.LazyTensor:
    assert like.shape is not None
    assert like.dtype is not None
    name, dtype, shape = like.name, like.dtype, ir.Shape(list(like.shape))

    def stored(perm: tuple[int, ...] | None) -> torch.Tensor:
        found = weights(target).detach()
        if isinstance(found, FakeTensor) or found.device.type == "meta":
            raise PeftfxError("this weight was captured without a value", target, "pass to_onnx(weights=...)")
        if perm is not None:
            return found.permute(perm)
        have = tensor_adapters.from_torch_dtype(found.dtype)
        if tuple(found.shape) != tuple(shape) or have != dtype:
            told = f"{have.name}{list(found.shape)}", f"{dtype.name}{list(shape)}"
            raise PeftfxError(f"the graph was captured with {told[1]} here, not {told[0]}", target, "capture it again")
        return found

    def read(perm: tuple[int, ...] | None = None) -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(load_contiguous(stored(perm)), name=name)

    lazy = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
    lazy.meta[PERMUTED], lazy.meta[PIECES] = read, lambda perm=None: pieces(stored(perm))
    return lazy


def _reader(graph: Graph, weights: _Weights) -> _Weights:
    """Return a function that reads base and adapter tensors by `weights`, and evaluates derived weights."""

    def read(target: str) -> torch.Tensor:
        recipe = graph.derived.get(target.removeprefix(f"{DERIVED}.")) if target.startswith(f"{DERIVED}.") else None
        return weights(target) if recipe is None else recipe.evaluate(read)

    return read


def _size(dimension: ir.SymbolicDim, translation: Translation) -> str | None:
    """Return the name of a size, or None if it is not known: sizes of one name would be taken for equal."""
    return None if dimension.value is None else translation.size(dimension.value)


def _name_interface(model: ir.Model, graph: Graph, translation: Translation) -> None:
    """Put the graph's names on inputs, outputs and sizes. Each name gets an output of its own."""
    for value in every_value(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else _size(d, translation) for d in value.shape])
    for value, spec in zip(model.graph.inputs, graph.inputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(list(spec.shape))
    seen: set[ir.Value] = set()
    for index, (value, name) in enumerate(zip(list(model.graph.outputs), translation.outputs, strict=True)):
        if value in seen or value.is_graph_input() or value.is_initializer():
            node = ir.node("Identity", [value])
            model.graph.append(node)
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            value = model.graph.outputs[index] = node.outputs[0]
        seen.add(value)
        value.name = name


def every_value(graph: ir.Graph) -> Iterable[ir.Value]:
    """Yield the inputs of a graph and all values that its nodes compute, also in inner graphs."""
    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs
