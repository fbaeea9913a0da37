"""Site: an adaptable place of a model, found by following the dataflow and never by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peftfx.errors import PeftfxError, nearest

#: Kinds of sites that have a weight that mixes features, or a row for each index. A norm's weight does neither; an
#: attention is a computation between weights.
WEIGHT_KINDS = ("linear", "conv", "embedding")
EXPERTS = (
    "experts"  #: a kind of site: a stack of linear weights, one for each expert, and each row of values has its own
)
NORM = "norm"  #: a kind of site, and its role
ATTENTION = "attention"  #: a kind of site, and its role
PATTERN = "pattern"  #: a kind of site: where a graph computes what a user's function computes; its role is the user's
SEQUENCE = "sequence"  #: a kind of site, and its role: the stream of tokens
ROUTER = "router"  #: the role of a linear layer whose output says which expert a value meets

#: What a site can be for. A fused site's own role names all it holds; its parts have the plain roles.
ROLES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("attention.qkv", "attention.kv", "attention.qk", "attention.qv"),
    *("attention.query_down", "attention.kv_down"),
    *("mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down"),
    *("experts.up", "experts.gate", "experts.gate_up", "experts.down"),
    *("embedding.token", "embedding.position", "embedding.type"),
    *(ATTENTION, "conv", EXPERTS, "head", "linear", NORM, ROUTER),
)


@dataclass(frozen=True)
class Part:
    """The rows of a fused weight that play one role, as half-open ranges of the output dimension."""

    role: str
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Call:
    """One occurrence of a site in a graph, by node names: `y = op(x, weight, bias)`.

    At an attention site `x` is the query, `op` and `y` the node whose value leaves the attention (probabilities times
    value, or the fused op), and `key` and `value` are its other operands; elsewhere those two are empty.
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
        count: of the query's heads.
        kept: of the key's and value's heads; each serves `count // kept` heads in a row.
        stacked: whether batch and heads are one axis of the query, [batch * heads, length, features].
        scale: what a query's product with a key is multiplied by ahead of the softmax.
        key, value: paths of the layers that make keys and values; of a fused layer both are its path.
        key_rows, value_rows: their rows, head by head.
        weight: `get_attr` target of the key's weight.
        width: how many features the two layers read.
        packed: whether query, key and value are one weight that is stored [in, out].
        output: path of the layer that reads what the attention gives; empty where none does.
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
    """An adaptable place. Its identity is its module path. Each family of kinds has a type of its own, below.

    Attributes:
        path: the module that owns the weight (`model.layers.0.self_attn.q_proj`); for a parameter that is not its
            module's `weight`, the parameter's own path. For attention, the module that computes it.
        kind: linear, conv, embedding, experts, norm or attention; sequence for the stream of tokens, pattern for a
            user's.
        role: one of `ROLES`; of a pattern, the user's.
        layer: the first number in the path.
        weight: `get_attr` target of the weight; tied sites share one. Empty for attention.
        bias: `get_attr` target of the bias.
        shape: the weight's shape as stored, of experts with their number first; `()` for attention.
        transposed: whether the weight, or each expert's, is stored [in, out].
        parts: what the rows of the weight are for, where they differ or some are for nothing of the role.
        calls: where the site runs, in order.
        groups: of a conv.
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
        """The full name of the weight in the model, under the module that it is read for."""
        own = self.weight.partition(".")[2] == self.path
        return self.path if own else f"{self.path}.weight".removeprefix(".")

    @property
    def rows_axis(self) -> int:
        """Which axis of the weight its output rows are, where it is seen as [out, in, ...] or [experts, out, in]."""
        return 1 if self.kind == EXPERTS else 0

    @property
    def rows(self) -> int:
        """How many output rows a linear weight has, or each expert's."""
        return self.shape[self.rows_axis + self.transposed]

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        told = (repr(self.path), self.role, *([shape] if shape else []))
        return f"{type(self).__name__}({', '.join(told)})"

    def to_dict(self) -> dict[str, Any]:
        """This site as JSON-ready values; sites of all families have the same keys."""
        first = dict.fromkeys(own.name for own in dataclasses.fields(Site))
        return {**first, **_NOTHING_MORE, **dataclasses.asdict(self)}


@dataclass(frozen=True, repr=False)
class WeightSite(Site):
    """Where a weight is applied: a linear layer, a conv, an embedding, or a stack of experts' weights."""


@dataclass(frozen=True, repr=False)
class NormSite(Site):
    """A norm: a statistic of the values, and parameters of the module that scale or shift what it gives."""


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionSite(Site):
    """An attention: a computation between weights.

    Attributes:
        heads: of a self-attention whose keys and values are each a linear layer's rows.
        headless: why there are no `heads`.
    """

    heads: Heads | None = None
    headless: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class HeadedSite(AttentionSite):
    """A self-attention whose heads, and the layers around it, are known: an attention method can act there."""

    heads: Heads = field()


@dataclass(frozen=True)
class Operand:
    """What a pattern's function is given at a match, or what it gives.

    Attributes:
        name: of the argument.
        shape: None for an axis whose size is free.
        dtype: as torch names it, `float32`.
        weight: `get_attr` target of the tensor, where it is one of the base's.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    weight: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class PatternSite(Site):
    """Where a graph computes what a pattern's function computes; it has no weight of its own.

    Its path is the innermost module that all of it runs in, the pattern's name and a number.

    Attributes:
        pattern: its name.
        operands: what the function is given here; the first is `x` of the calls.
        output: what it gives.
        numbers: the values of its `float` arguments.
    """

    pattern: str
    operands: tuple[Operand, ...]
    output: Operand
    numbers: tuple[tuple[str, float], ...] = ()

    def operand(self, name: str) -> Operand:
        """The operand of this name.

        Raises:
            PeftfxError: the spelling that matched has none.
        """
        names = {operand.name: operand for operand in self.operands}
        if name not in names:
            what = f"this match of {self.pattern} has no operand {name!r}"
            raise PeftfxError(what, self.path, nearest(name, names) or f"it has {', '.join(names)}")
        return names[name]

    @property
    def width(self) -> int:
        """The size of the last axis of what the function gives.

        Raises:
            PeftfxError: it is free.
        """
        size = self.output.shape[-1] if self.output.shape else None
        if size is None:
            what = f"the last axis of what {self.pattern} gives has no fixed size"
            raise PeftfxError(what, self.path, "a method of its parameters needs an axis that the model fixes")
        return size


#: The fields that some families of sites have, so that rows of all have them.
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
    """The stream of tokens, ahead of which a soft prompt goes. Its weight is that of the table that embeds them."""

    @property
    def embedding(self) -> str:
        """The path of the module that embeds the text."""
        return self.weight.partition(".")[2].removesuffix(".weight")

    @property
    def tokens(self) -> str:
        """The argument that holds the ids."""
        return self.calls[0].x


def plays(site: Site, role: str) -> bool:
    """Whether the site, or a part of it, has this role or one of this group of roles."""
    return any(in_role(own, role) for own in (site.role, *(part.role for part in site.parts)))


def in_role(own: str, role: str) -> bool:
    """Whether `own` is `role`, or belongs to the group that `role` names."""
    return own == role or own.startswith(f"{role}.")


def layer_of(path: str) -> int | None:
    """The first number in a module path."""
    return next((int(component) for component in path.split(".") if component.isdigit()), None)
