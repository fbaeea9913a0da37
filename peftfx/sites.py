"""Sites: the adaptable places of a model, found by following the dataflow and never by name."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from peftfx.errors import PeftfxError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from peftfx.expression import Target
    from peftfx.target import Match

#: Kinds of sites that have a weight that mixes features, or a row for each index. A norm's weight does neither; an
#: attention is a computation between weights.
WEIGHT_KINDS = ("linear", "conv", "embedding")
NORM = "norm"  #: a kind of site, and its role

#: What a site can be for. A fused site's own role names all it holds; its parts have the plain roles.
ROLES = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("attention.qkv", "attention.kv", "attention.qk", "attention.qv"),
    *("mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down"),
    *("embedding.token", "embedding.position", "embedding.type"),
    *("attention", "conv", "head", "linear", NORM),
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
    """An adaptable place. Its identity is its module path.

    Attributes:
        path: the module that owns the weight (`model.layers.0.self_attn.q_proj`); for a parameter that is not its
            module's `weight`, the parameter's own path. For attention, the module that computes it.
        kind: linear, conv, embedding, norm or attention.
        role: one of `ROLES`.
        layer: the first number in the path.
        weight: `get_attr` target of the weight; tied sites share one. Empty for attention.
        bias: `get_attr` target of the bias.
        shape: the weight's shape as stored; `()` for attention.
        transposed: whether the weight is stored [in, out].
        parts: what the rows of the weight are for, where they differ or some are for nothing of the role.
        calls: where the site runs, in order.
        groups: of a conv.
        heads: of a self-attention whose keys and values are each a linear layer's rows.
        headless: why an attention has no `heads`.
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
    heads: Heads | None = None
    headless: str = ""

    def to_dict(self) -> dict[str, Any]:
        """This site as JSON-ready values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites of one graph, in the order in which they run."""

    items: tuple[Site, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> Site | Sites:
        return Sites(self.items[index]) if isinstance(index, slice) else self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.items)

    def filter(self, *, role: str | None = None, kind: str | None = None, layer: int | None = None) -> Sites:
        """The sites that have all the given properties; `role` may name a group, such as `mlp`, or a part's role."""
        return Sites(
            tuple(
                site
                for site in self.items
                if (role is None or plays(site, role))
                and (kind is None or site.kind == kind)
                and (layer is None or site.layer == layer)
            )
        )

    def select(self, target: Target) -> list[Match]:
        """The sites that a target expression picks; see `peftfx.target`."""
        from peftfx.target import select  # target.py is written in terms of sites

        return select(self, target=target)

    def by_path(self, path: str) -> Site:
        """The site at this module path; one with a weight, if an attention has the same path."""
        found = [site for site in self.items if site.path == path]
        if not found:
            hint = nearest(path, (site.path for site in self.items)) or "`table()` lists the sites"
            raise PeftfxError("there is no site at this path", path, hint)
        return next((site for site in found if site.kind != "attention"), found[0])

    def roles(self) -> Counter[str]:
        """How many sites have each role."""
        return Counter(site.role for site in self.items)

    def to_dict(self) -> list[dict[str, Any]]:
        """One JSON-ready row for each site."""
        return [site.to_dict() for site in self.items]

    def table(self) -> Table:
        """The sites as a rich table."""
        from rich.table import Table

        table = Table("path", "kind", "role", "layer", "shape", "parts", "calls")
        for site in self.items:
            layer = "" if site.layer is None else str(site.layer)
            table.add_row(*_cells(site)[:3], layer, *_cells(site)[3:])
        return table

    def __str__(self) -> str:
        counts = ", ".join(f"{role} {count}" for role, count in sorted(self.roles().items()))
        rows = [_cells(site) for site in self.items]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(6)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
        return "\n".join([f"{len(self)} sites: {counts}", *(line.rstrip() for line in lines)])


def plays(site: Site, role: str) -> bool:
    """Whether the site, or a part of it, has this role or one of this group of roles."""
    return any(in_role(own, role) for own in (site.role, *(part.role for part in site.parts)))


def in_role(own: str, role: str) -> bool:
    """Whether `own` is `role`, or belongs to the group that `role` names."""
    return own == role or own.startswith(f"{role}.")


def layer_of(path: str) -> int | None:
    """The first number in a module path."""
    return next((int(component) for component in path.split(".") if component.isdigit()), None)


def _cells(site: Site) -> list[str]:
    shape = "x".join(map(str, site.shape)) + (" transposed" if site.transposed else "")
    parts = " ".join(f"{part.role.rpartition('.')[2]}{_ranges(part.rows)}" for part in site.parts)
    return [site.path, site.kind, site.role, shape, parts, f"x{len(site.calls)}" if len(site.calls) != 1 else ""]


def _ranges(rows: tuple[tuple[int, int], ...]) -> str:
    shown = ",".join(f"{start}:{stop}" for start, stop in rows[:2])
    return f"[{shown}{f',+{len(rows) - 2}' if len(rows) > 2 else ''}]"
