"""Sites: the sequence of a graph's adaptable places, to filter, select from and print."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

from peftfx.errors import PeftfxError, how_many, nearest
from peftfx.sites.dataflow import Dataflow
from peftfx.sites.expression import Target
from peftfx.sites.site import (
    HEAD,
    PATTERN,
    AttentionSite,
    Call,
    HeadedSite,
    NormSite,
    PatternSite,
    Site,
    WeightSite,
    plays,
)
from peftfx.sites.target import SelectedSite, select

if TYPE_CHECKING:
    import networkx as nx
    from rich.table import Table

    from peftfx.pages.page import Page

_S = TypeVar("_S", bound=Site)


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites of one graph, in the order in which they run.

    Attributes:
        items: the sites.
        called: the paths of all modules that the graph calls, sites or not.
        unread: the paths of the modules that the call ran, but whose results reach none of its outputs.
        reads: for each module that is not a site, but has parameters that the graph reads: what reads them.
        elsewhere: for each site whose module the graph also runs in other places: their names. No adapter acts there.
        passed_by: for each site where HF PEFT's layer would act differently from an adapter of the weight's operation:
            why.
        read_past: for each parameter of a site that something else than the site's operation reads: what.
        flow: the connections between the sites; None for a selection, which lacks some sites.
        misses: for each pattern without a match in the graph: where it came closest, and what differs there.

    Examples:
        >>> sites = peftfx.inspect(model)
        >>> [site.path for site in sites.filter(role="mlp.down")]
        ['model.layers.0.mlp.down_proj']
    """

    items: tuple[Site, ...] = ()
    called: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    unread: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    reads: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)
    passed_by: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    flow: Dataflow | None = field(default=None, repr=False, compare=False)
    misses: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    read_past: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

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

    @functools.cached_property
    def weights(self) -> tuple[WeightSite, ...]:
        """The sites with weights: linear layers, convs, embeddings and stacks of experts."""
        return self._of(WeightSite)

    @functools.cached_property
    def weights_by_path(self) -> Mapping[str, WeightSite]:
        """The sites with weights, by their paths."""
        return {site.path: site for site in self.weights}

    @functools.cached_property
    def norms(self) -> tuple[NormSite, ...]:
        """The norm sites."""
        return self._of(NormSite)

    @functools.cached_property
    def attentions(self) -> tuple[AttentionSite, ...]:
        """The attention sites."""
        return self._of(AttentionSite)

    @functools.cached_property
    def headed(self) -> tuple[HeadedSite, ...]:
        """The attentions whose heads are known. Attention methods can act at these."""
        return self._of(HeadedSite)

    @functools.cached_property
    def patterns(self) -> tuple[PatternSite, ...]:
        """The sites where the graph computes what users' patterns compute."""
        return self._of(PatternSite)

    @functools.cached_property
    def running(self) -> frozenset[str]:
        """The paths of all modules that the graph calls, or at whose operations it has sites."""
        return self.called.union(site.path for site in self.items)

    def _of(self, family: type[_S]) -> tuple[_S, ...]:
        return tuple(site for site in self.items if isinstance(site, family))

    def filter(self, *, role: str | None = None, kind: str | None = None, layer: int | None = None) -> Sites:
        """Return the sites that have all the given properties.

        Args:
            role: the role of the site or of a part of it; a group, such as `mlp`, stands for all roles in it.
            kind: `linear`, `conv`, `embedding`, `norm`, `attention` and others.
            layer: the number of the layer, from 0.
        """
        return Sites(
            tuple(
                site
                for site in self.items
                if (role is None or plays(site, role))
                and (kind is None or site.kind == kind)
                and (layer is None or site.layer == layer)
            )
        )

    def select(self, target: Target) -> list[SelectedSite]:
        """Return the sites that the expression `target` picks; see `peftfx.sites.target`.

        Examples:
            >>> [match.site.role for match in peftfx.inspect(model).select("mlp & ~mlp.down")]
            ['mlp.gate', 'mlp.up']
        """
        return select(self, target=target)

    def by_path(self, path: str) -> Site:
        """Return the site at this module `path`. If an attention shares it with a weight, return the weight's site."""
        found = [site for site in self.items if site.path == path]
        if not found:
            hint = nearest(path, (site.path for site in self.items)) or "`table()` lists the sites"
            raise PeftfxError("there is no site at this path", path, hint)
        return next((site for site in found if site.kind != "attention"), found[0])

    def renamed(self, now: Callable[[str, str], str]) -> Sites:
        """Return these sites for a graph whose nodes have changed.

        Args:
            now: a function of a node's name and its place in a call, such as `x`, that gives the name of the node that
                replaces it. If it gives an empty text, the call is removed.
        """
        items = (dataclasses.replace(site, calls=tuple(_renamed(site.calls, now))) for site in self.items)
        return dataclasses.replace(self, items=tuple(items))

    def roles(self) -> Counter[str]:
        """Return how many sites have each role.

        Examples:
            >>> peftfx.inspect(model).roles()["attention.query"]
            1
        """
        return Counter(site.role for site in self.items)

    def network(self) -> nx.DiGraph:
        """Return the network of these sites; see `peftfx.sites.network`. It is made once, and cannot be changed.

        Raises:
            PeftfxError: these are not all sites of a base model, as `peftfx.inspect` gives them.

        Examples:
            >>> network = peftfx.inspect(model).network()
            >>> network.has_edge("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
            True
        """
        return self._network

    @functools.cached_property
    def _network(self) -> nx.DiGraph:
        from peftfx.sites.network import make_network

        if self.flow is None:
            hint = "ask the sites of the whole base, as peftfx.inspect(model) gives them"
            raise PeftfxError("the connections between these sites are not known", "network", hint)
        return make_network([site for site in self.items if site.kind != PATTERN], self.flow)

    def show(self, title: str = "") -> Page:
        """Return these sites as a page with a search. Equal layers are drawn once. `.save(file)` writes the page.

        Args:
            title: the heading of the page.

        Raises:
            PeftfxError: these are not all sites of a base model, as `peftfx.inspect` gives them.
        """
        from peftfx.sites.picture import picture

        return picture(self.items, self.network(), title or "The sites of a model")

    def _repr_html_(self) -> str | None:
        return None if self.flow is None else self.show()._repr_html_()

    def equal_layers(self) -> list[tuple[str, ...]]:
        """Return the paths of the model's layers, in groups of equal layers."""
        from peftfx.sites.network import equal_layers

        return equal_layers(self.network())

    def layer_ends(self) -> dict[str, str]:
        """Return the network's node where each layer ends; see `peftfx.sites.network.layer_ends`."""
        from peftfx.sites.network import layer_ends

        return layer_ends(self.network())

    def to_dict(self) -> list[dict[str, Any]]:
        """Return one JSON-ready row for each site."""
        return [site.to_dict() for site in self.items]

    def table(self) -> Table:
        """Return the sites as a rich table."""
        from rich.table import Table

        table = Table("path", "kind", "role", "layer", "shape", "parts", "calls")
        for site in self.items:
            layer = "" if site.layer is None else str(site.layer)
            table.add_row(*_cells(site)[:3], layer, *_cells(site)[3:])
        return table

    def __repr__(self) -> str:
        kinds = Counter(site.kind for site in self.items)
        return f"Sites({', '.join(f'{kind} {count}' for kind, count in kinds.items()) or 'none'})"

    def __str__(self) -> str:
        counts = ", ".join(f"{role} {count}" for role, count in sorted(self.roles().items()))
        rows = [_cells(site) for site in self.items]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(6)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
        return "\n".join([f"{how_many(len(self), 'site')}: {counts}", *(line.rstrip() for line in lines)])


def _renamed(calls: Iterable[Call], now: Callable[[str, str], str]) -> Iterator[Call]:
    for call in calls:
        given = {what: name for what, name in dataclasses.asdict(call).items() if name}
        named = {what: now(name, what) for what, name in given.items()}
        if all(named.values()):
            yield Call(**named)


def _cells(site: Site) -> list[str]:
    shape = "x".join(map(str, site.shape)) + (" transposed" if site.transposed else "")
    parts = " ".join(f"{part.role.rpartition('.')[2]}{_ranges(part.rows)}" for part in site.parts)
    return [site.path, site.kind, site.role, shape, parts, f"x{len(site.calls)}" if len(site.calls) != 1 else ""]


def _ranges(rows: tuple[tuple[int, int], ...]) -> str:
    shown = ",".join(f"{start}:{stop}" for start, stop in rows[:2])
    return f"[{shown}{f',+{len(rows) - 2}' if len(rows) > 2 else ''}]"


def without_roles(sites: Sites, lone: Collection[str], heads: Collection[str]) -> Sites:
    """Return sites of which some have their kinds as their roles, because what flows to and from them is not known.

    Args:
        sites: the sites.
        lone: the paths of these sites.
        heads: the paths of layers that are known to be heads.
    """
    items = (
        dataclasses.replace(s, role=HEAD if s.path in heads else s.kind, parts=()) if s.path in lone else s
        for s in sites
    )
    return dataclasses.replace(sites, items=tuple(items))
