"""Site: an adaptable place of a model. Sites are found by following the dataflow, never by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peftfx.errors import PeftfxError, nearest

#: Kinds of sites whose weight mixes features, or has a row for each index. A norm's weight does neither, and an
#: attention has no weight of its own.
WEIGHT_KINDS = ("linear", "conv", "embedding")
EXPERTS = "experts"  #: a kind of site: a stack of linear weights; each row of values uses the weight of its own expert
NORM = "norm"  #: a kind of site, and its role
ATTENTION = "attention"  #: a kind of site, and its role
PATTERN = "pattern"  #: a kind of site: where a graph computes what a user's function computes; the user gives the role
SEQUENCE = "sequence"  #: a kind of site, and its role: the stream of tokens
HEAD = "head"  #: the role of a linear layer that gives a model's output
ROUTER = "router"  #: the role of a linear layer whose output selects the expert of a value

#: The roles that a site can have. The role of a fused site names all that the weight holds; its parts have the plain
#: roles.
ROLES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("attention.qkv", "attention.kv", "attention.qk", "attention.qv"),
    *("attention.query_down", "attention.kv_down"),
    *("mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down", "mlp.output_gate"),
    *("experts.up", "experts.gate", "experts.gate_up", "experts.down"),
    *("embedding.token", "embedding.position", "embedding.type"),
    *(ATTENTION, "conv", EXPERTS, HEAD, "linear", NORM, ROUTER),
)


@dataclass(frozen=True)
class Part:
    """The rows of a fused weight that play one role, as half-open ranges of the output dimension."""

    role: str
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Call:
    """One call of a site in a graph, by node names: `y = op(x, weight, bias)`.

    At an attention site `x` is the query, and `op` and `y` are the node whose value leaves the attention (probabilities
    times value, or the fused op). `key` and `value` are the attention's other operands; at other sites both are empty.
    """

    x: str
    op: str
    y: str
    key: str = ""
    value: str = ""


@dataclass(frozen=True)
class Heads:
    """The heads of a self-attention, and the linear layers around it.

    Attributes:
        count: the number of the query's heads.
        kept: the number of the key's and value's heads; each serves `count // kept` successive query heads.
        stacked: whether batch and heads are one axis of the query, [batch * heads, length, features].
        scale: the factor of a query's product with a key before the softmax.
        key, value: paths of the layers that compute keys and values; for a fused layer both are its path.
        key_rows, value_rows: the rows of these layers that are keys and values, head by head.
        weight: `get_attr` target of the key's weight.
        width: the number of features that the two layers read.
        packed: whether query, key and value are one weight that is stored [in, out].
        output: path of the layer that reads the attention's output; empty if there is no such layer.
    """

    count: int
    kept: int
    stacked: bool
    scale: float
    key: str
    value: str
    key_rows: tuple[tuple[int, int], ...]
    value_rows: tuple[tuple[int, int], ...]
    weight: str
    width: int
    packed: bool
    output: str


@dataclass(frozen=True)
class Site:
    """An adaptable place, identified by its module path. Each family of kinds has a class of its own below.

    Attributes:
        path: the module that owns the weight (`model.layers.0.self_attn.q_proj`); for a parameter that is not its
            module's `weight`, the parameter's own path. For attention, the module that computes it.
        kind: linear, conv, embedding, experts, norm or attention; sequence for the stream of tokens, pattern for a
            match of a user's pattern.
        role: one of `ROLES`; at a pattern, the role that the user gave.
        layer: the first number in the path.
        weight: `get_attr` target of the weight; tied sites share one. Empty for attention.
        bias: `get_attr` target of the bias.
        shape: the weight's stored shape; the first axis of experts is their number; `()` for attention.
        transposed: whether the weight, or each expert's, is stored [in, out].
        parts: the roles of the weight's rows, where rows have different roles or some rows have none.
        calls: where the site runs, in order.
        groups: the number of groups of a conv.

    Examples:
        >>> site = peftfx.inspect(model).by_path("model.layers.0.self_attn.q_proj")
        >>> site.role, site.kind
        ('attention.query', 'linear')
    """

    path: str
    kind: str
    role: str
    layer: int | None
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    transposed: bool
    parts: tuple[Part, ...]
    calls: tuple[Call, ...]
    groups: int = 1

    @property
    def parameter(self) -> str:
        """The full name of the weight in the model, under the module that reads it."""
        own = self.weight.partition(".")[2] == self.path
        return self.path if own else f"{self.path}.weight".removeprefix(".")

    @property
    def rows_axis(self) -> int:
        """The axis of the weight's output rows, in the layout [out, in, ...] or [experts, out, in]."""
        return 1 if self.kind == EXPERTS else 0

    @property
    def rows(self) -> int:
        """The number of output rows of a linear weight, or of each expert's weight."""
        return self.shape[self.rows_axis + self.transposed]

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        told = (repr(self.path), self.role, *([shape] if shape else []))
        return f"{type(self).__name__}({', '.join(told)})"

    def to_dict(self) -> dict[str, Any]:
        """Return this site as JSON-ready values. Sites of all families have the same keys."""
        first = dict.fromkeys(own.name for own in dataclasses.fields(Site))
        return {**first, **_NOTHING_MORE, **dataclasses.asdict(self)}


@dataclass(frozen=True, repr=False)
class WeightSite(Site):
    """A site that applies a weight: a linear layer, a conv, an embedding, or a stack of experts' weights."""


@dataclass(frozen=True, repr=False)
class NormSite(Site):
    """A norm: a statistic of the values, and parameters of the module that scale or shift the result."""


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionSite(Site):
    """An attention: a computation between weights, without a weight of its own.

    Attributes:
        heads: the heads of a self-attention whose keys and values are each the rows of a linear layer.
        headless: why `heads` is None.
    """

    heads: Heads | None = None
    headless: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class HeadedSite(AttentionSite):
    """A self-attention whose heads and surrounding layers are known, so that attention methods can act there."""

    heads: Heads = field()


@dataclass(frozen=True)
class Operand:
    """An argument of a pattern's function at a match, or its result.

    Attributes:
        name: the argument's name.
        shape: the sizes of the axes; None for a free size.
        dtype: the dtype's name in torch, such as `float32`.
        weight: `get_attr` target of the tensor, if the base owns the tensor.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    weight: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class PatternSite(Site):
    """A place where a graph computes what a pattern's function computes. It has no weight of its own.

    Its path joins the innermost module that runs the whole match, the pattern's name, and a number.

    Attributes:
        pattern: the pattern's name.
        operands: the function's arguments at this match; the first is `x` of the calls.
        output: the function's result.
        numbers: the values of the function's `float` arguments.
    """

    pattern: str
    operands: tuple[Operand, ...]
    output: Operand
    numbers: tuple[tuple[str, float], ...] = ()

    def operand(self, name: str) -> Operand:
        """Return the operand of this `name`.

        Raises:
            PeftfxError: the spelling that matched has no such operand.
        """
        names = {operand.name: operand for operand in self.operands}
        if name not in names:
            what = f"this match of {self.pattern} has no operand {name!r}"
            raise PeftfxError(what, self.path, nearest(name, names) or f"it has {', '.join(names)}")
        return names[name]

    @property
    def width(self) -> int:
        """The size of the last axis of the function's result.

        Raises:
            PeftfxError: the size is free.
        """
        size = self.output.shape[-1] if self.output.shape else None
        if size is None:
            what = f"the last axis of what {self.pattern} gives has no fixed size"
            raise PeftfxError(what, self.path, "a method of its parameters needs an axis that the model fixes")
        return size


#: The fields that only some families of sites have. `to_dict` gives them for all sites.
_NOTHING_MORE: dict[str, Any] = {
    "heads": None,
    "headless": "",
    "pattern": "",
    "operands": (),
    "output": None,
    "numbers": (),
}


@dataclass(frozen=True, repr=False)
class SequenceSite(Site):
    """The stream of tokens, before which a soft prompt goes. Its weight is the table that embeds the tokens.

    Attributes:
        beside: the paths of other tables that embed the same tokens, as one for each layer.
    """

    beside: tuple[str, ...] = ()

    @property
    def embedding(self) -> str:
        """The path of the module that embeds the text."""
        return self.weight.partition(".")[2].removesuffix(".weight")

    @property
    def tokens(self) -> str:
        """The name of the argument that holds the token ids."""
        return self.calls[0].x


def plays(site: Site, role: str) -> bool:
    """Return whether the site, or a part of it, has this role or a role of this group."""
    return any(in_role(own, role) for own in (site.role, *(part.role for part in site.parts)))


def in_role(own: str, role: str) -> bool:
    """Return whether the role `own` is `role`, or belongs to the group that `role` names."""
    return own == role or own.startswith(f"{role}.")


def layer_of(path: str) -> int | None:
    """Return the first number in a module path, or None."""
    return next((int(component) for component in path.split(".") if component.isdigit()), None)
