"""Dataflow: for every node of a graph, the sources of its value, found in one forward pass.

The origins of a value are the nodes found by going back from the value to the first *source* on every branch. A source
is a weight op, a matrix product, an attention, a floating-point input, an op that this module does not know, or a
*join*. A join is a sum of values of different origins, such as a residual connection, so a walk back from one layer
never reaches the layers before the join.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


def names(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


# What happened to a value on the way from an origin, as bits.
ACTIVATED, NORMED, SPLIT, GATED, MIXED = 1, 2, 4, 8, 16

SPLITS = names(
    "split split_with_sizes chunk tensor_split unbind unsafe_chunk unsafe_split slice select narrow index index_select"
    " gather take_along_dim unsafe_split_with_sizes"
)
MOVEMENT = SPLITS | names(
    "view reshape _unsafe_view view_as reshape_as transpose permute t numpy_T mT adjoint movedim moveaxis swapaxes"
    " swapdims unflatten flatten getitem unsqueeze squeeze expand expand_as broadcast_to repeat tile repeat_interleave"
    " contiguous clone alias detach cat concat concatenate stack hstack vstack roll pad constant_pad_nd flip unfold"
    " pixel_shuffle pixel_unshuffle lift_fresh_copy"
)
ACTIVATIONS = names(
    "relu relu6 gelu silu sigmoid tanh elu selu celu leaky_relu mish hardswish hardsigmoid hardtanh softplus softsign"
    " glu erf expm1 prelu rrelu log_sigmoid"
)
BENDS = ACTIVATIONS | names("exp exp2 pow square acos asin atan erfc")
SUMS = names("add sub rsub lerp where maximum minimum")
PRODUCTS = names("mul div true_divide multiply divide")
ELEMENTWISE = (
    BENDS
    | SUMS
    | PRODUCTS
    | names(
        "neg to _to_copy type_as float half bfloat16 dropout alpha_dropout feature_dropout sqrt rsqrt"
        " log abs reciprocal clamp clamp_min clamp_max clip masked_fill nan_to_num sin cos addcmul"
    )
)
NORMS = names(
    "layer_norm native_layer_norm rms_norm group_norm native_group_norm batch_norm instance_norm mean var var_mean std"
    " linalg_vector_norm norm normalize"
)
RESAMPLING = names(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d"
    " avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d sum amax"
)
PICKS = names("index index_select gather take_along_dim")  #: ops that pick values by indices
TRANSPARENT = MOVEMENT | ELEMENTWISE | NORMS | RESAMPLING
MATMULS = names("matmul bmm baddbmm einsum mm")
SOFTMAX = frozenset({"softmax", "_softmax"})
FUSED_ATTENTION = "scaled_dot_product_attention"

_SIZES = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_MANY = 16  # a value with more origins becomes an origin itself, which keeps the pass linear


@dataclass(frozen=True)
class Flow:
    """The sources that a value comes from.

    Attributes:
        origins: the first sources on the way back, each with what happened on the way (ACTIVATED, ...).
        products: matrix products whose entries this value has, possibly scaled, masked and biased: attention scores, if
            a softmax follows.
        softmax: the softmax whose probabilities this value has.
        bent: whether a function that is no straight line was applied to each of those entries.
    """

    origins: Mapping[fx.Node, int] = field(default_factory=dict)
    products: tuple[fx.Node, ...] = ()
    softmax: fx.Node | None = None
    bent: bool = False


NOTHING = Flow()


#: Ops that take the larger or the smaller of two tensors, but are named as reductions are.
_OF_TWO: Mapping[object, str] = {torch.ops.aten.max.other: "maximum", torch.ops.aten.min.other: "minimum"}


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return an operator's arguments by the names of its schema, in its order, with defaults filled in."""
    wanted = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**dict(zip((argument.name for argument in wanted), node.args, strict=False)), **node.kwargs}
    return {argument.name: given.get(argument.name, argument.default_value) for argument in wanted}


def op_name(node: fx.Node) -> str:
    """Return an op's name without namespace, overload and in-place mark: `add` for `aten.add_.Tensor`."""
    target = node.target
    if target in _OF_TWO:
        return _OF_TWO[target]
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        name = name.removeprefix("aten::")
        return name if name.endswith("__") else name.removesuffix("_")
    return getattr(target, "__name__", str(target))


def trace_flow(nodes: Iterable[fx.Node], weight_ops: Collection[fx.Node]) -> dict[fx.Node, Flow]:
    """Return the flow of every node. `weight_ops` are the ops that roles are assigned to."""
    flows: dict[fx.Node, Flow] = {}
    for node in nodes:
        flows[node] = _flow(node, flows, weight_ops)
    return flows


def data_of(node: fx.Node, flows: Mapping[fx.Node, Flow]) -> list[fx.Node]:
    """Return the operands of a node that are computed from weights or inputs."""
    return [n for n in node.all_input_nodes if flows[n].origins]


def operands(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the left and the right operand of a matrix product, or None if it is not a product of two nodes."""
    args = product.args
    if op_name(product) == "baddbmm":
        args = args[1:]
    elif op_name(product) == "einsum":
        args = tuple(args[1]) if isinstance(args[1], (list, tuple)) else ()
    if len(args) < 2 or not isinstance(args[0], fx.Node) or not isinstance(args[1], fx.Node):
        return None
    return args[0], args[1]


def _flow(node: fx.Node, flows: Mapping[fx.Node, Flow], weight_ops: Collection[fx.Node]) -> Flow:
    source = Flow({node: 0})
    value = node.meta.get("val")
    if node.op == "placeholder":
        return source if isinstance(value, torch.Tensor) and value.is_floating_point() else NOTHING
    if node.op != "call_function" or isinstance(value, _SIZES):
        return NOTHING
    if isinstance(value, torch.Tensor) and value.dtype is torch.bool:
        return NOTHING  # the result of a comparison selects values, and is no value itself
    if node in weight_ops:
        return source
    name = op_name(node)
    sources = node.all_input_nodes[:1] if name in PICKS else node.all_input_nodes
    inputs = [flow for n in sources if (flow := flows[n]).origins]
    if not inputs:
        return NOTHING
    if name in SOFTMAX:
        return Flow({node: 0}, softmax=node)
    if name in MATMULS:
        left = (operands(node) or (node,))[0]
        is_scores = left is not node and flows[left].softmax is None
        return Flow({node: 0}, products=(node,) if is_scores else ())
    return _through(node, name, inputs) if name in TRANSPARENT or is_depthwise(node) else source


def _through(node: fx.Node, name: str, inputs: list[Flow]) -> Flow:
    origins = _merge(node, name, inputs)
    keeps_entries = name != "gather" and (name in MOVEMENT or name in ELEMENTWISE)
    if not keeps_entries:
        return Flow(origins)
    products = tuple(dict.fromkeys(p for flow in inputs for p in flow.products))[:_MANY]
    bent = bool(products) and (name in BENDS or any(flow.bent for flow in inputs))
    return Flow(origins, products, next((flow.softmax for flow in inputs if flow.softmax), None), bent)


def _merge(node: fx.Node, name: str, inputs: list[Flow]) -> dict[fx.Node, int]:
    origins: dict[fx.Node, int] = {}
    for flow in inputs:
        for origin, marks in flow.origins.items():
            origins[origin] = origins.get(origin, 0) | marks
    if (name in SUMS and _is_join(inputs)) or len(origins) > _MANY:
        return {node: 0}
    mark = ACTIVATED * (name in ACTIVATIONS) | NORMED * (name in NORMS) | SPLIT * (name in SPLITS)
    mark |= MIXED * is_depthwise(node)
    if name in PRODUCTS and len(inputs) > 1 and any(flow.origins.keys() != origins.keys() for flow in inputs):
        mark |= GATED
    return {origin: marks | mark for origin, marks in origins.items()} if mark else origins


def _is_join(inputs: list[Flow]) -> bool:
    """Return whether no input's origins contain all other origins. `x + f(x)` of one value is not a join.

    Floating-point inputs of the graph count only if a value comes from nothing else, as rotary tables may be inputs.
    """
    sets = [frozenset(o for o in flow.origins if o.op != "placeholder") or frozenset(flow.origins) for flow in inputs]
    return not any(all(other <= one for other in sets) for one in sets)


def is_depthwise(node: fx.Node) -> bool:
    """Return whether a node is a convolution of each channel by itself, which mixes positions, not features."""
    if not op_name(node).startswith("conv") or len(node.args) < 7:
        return False
    source, groups = node.args[0], node.args[6]
    assert isinstance(source, fx.Node)
    shapes = (source.meta["val"].shape, node.meta["val"].shape)
    return isinstance(groups, int) and groups > 1 and all(bool(shape[1] == groups) for shape in shapes)


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and all nodes that it is computed from, each once, going back from the node."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        yield current
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        waiting += new
