"""The network of a model's sites: what reads what, found again by cutting values; targets, layers and files of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import networkx as nx
import pytest
import torch
from support.zoo import Captured
from torch import nn

import peftfx
from peftfx import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.sites.dataflow import Dataflow, Junction, Link
from peftfx.sites.network import cut_layers, equal_layers, inner_layer, keys_of, make_network
from peftfx.sites.site import Call, Site
from peftfx.sites.sites import Sites
from peftfx.sites.target import select

MODELS = ("llama", "bert", "vit", "t5")


@pytest.fixture(params=MODELS)
def seen(request: pytest.FixtureRequest, captured: Callable[[str], Captured]) -> tuple[Graph, Sites]:
    graph = captured(request.param).graph
    return graph, graph.sites


def by_users(graph: Graph, site: Site) -> set[str]:
    """The names of all nodes that a site's values reach: a plain walk over the graph's users."""
    nodes = {node.name: node for node in graph.nodes()}
    waiting, found = [nodes[call.y] for call in site.calls], set()
    while waiting:
        for user in waiting.pop().users:
            if user.name not in found:
                found.add(user.name)
                waiting.append(user)
    return found


def test_what_is_downstream_is_what_a_walk_over_the_graph_reaches(seen: tuple[Graph, Sites]) -> None:
    graph, sites = seen
    network = sites.network()
    assert network is sites.network()
    assert nx.is_frozen(network)
    sited = set(keys_of(sites))
    for site in sites:
        reached = by_users(graph, site)
        want = {s.path for s in sites if s is not site and any(call.op in reached for call in s.calls)}
        found = {network.nodes[n]["path"] for n in nx.descendants(network, site.path) if n in sited}
        assert found == want, site.path


def test_nodes_and_edges_tell_what_there_is(captured: Callable[[str], Captured]) -> None:
    network = captured("llama").graph.sites.network()
    down = network.nodes["model.layers.1.mlp.down_proj"]
    assert (down["kind"], down["role"], down["layer"], len(down["shape"])) == ("linear", "mlp.down", 1, 2)
    gate = network.edges["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]
    up = network.edges["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    assert (gate["ops"], up["ops"]) == (("silu", "mul"), ("mul",))
    assert set(network.pred["model.layers.0.self_attn"]) == {
        *(f"model.layers.0.self_attn.{x}_proj" for x in "qkv"),
        "input:attention_mask",
    }
    assert set(network.pred["output:logits"]) == {"lm_head"}


def test_a_join_stands_for_what_it_adds(captured: Callable[[str], Captured]) -> None:
    """A residual stream of any length gives no site more than a few edges."""
    network = captured("llama").graph.sites.network()
    assert max(degree for _, degree in network.in_degree()) <= 6


def test_layers_that_are_alike_and_where_they_end(captured: Callable[[str], Captured]) -> None:
    llama = captured("llama").graph.sites
    assert llama.equal_layers() == [("model.layers.0", "model.layers.1")]
    ends, network = llama.layer_ends(), llama.network()
    for layer, end in ends.items():
        cut = nx.DiGraph(network)
        cut.remove_node(end)
        assert not nx.has_path(cut, "model.embed_tokens", "lm_head"), layer
        assert "model.layers.0.mlp.down_proj" in nx.ancestors(network, end)
    assert list(ends) == ["model.layers.0", "model.layers.1"]
    t5 = captured("t5").graph.sites  # its first blocks alone have a bias of positions
    assert t5.equal_layers() == [(f"{side}.block.{i}",) for side in ("encoder", "decoder") for i in (0, 1)]
    assert set(t5.layer_ends()) == {layer for (layer,) in t5.equal_layers()}


class Wider(nn.Module):
    """Two layers of different widths, and a third as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 4)) for n in (8, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_layers_of_another_shape_are_not_alike() -> None:
    sites = peftfx.capture(Wider(), {"x": torch.randn(2, 4)}).sites
    assert sites.equal_layers() == [("layers.0", "layers.2"), ("layers.1",)]


class Blocks(nn.Module):
    """Two blocks of two widths: in each, three layers of a norm and a linear one, and a wider one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for width in (4, 6):
            layers = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(3)]
            self.blocks.append(nn.ModuleDict({"layers": nn.Sequential(*layers), "out": nn.Linear(width, width + 2)}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["out"](block["layers"](x))  # type: ignore[index]
        return x


def test_a_layer_like_no_other_is_cut_where_layers_inside_it_are_alike() -> None:
    network = peftfx.capture(Blocks(), {"x": torch.randn(2, 4)}).sites.network()
    assert equal_layers(network) == [("blocks.0",), ("blocks.1",)]
    cut = cut_layers(network)
    assert cut == {"blocks.0", "blocks.1"}
    inner = [tuple(f"blocks.{i}.layers.{j}" for j in range(3)) for i in (0, 1)]
    assert equal_layers(network, cut) == [inner[0], ("blocks.0",), inner[1], ("blocks.1",)]
    assert inner_layer("blocks.1.layers.2.0", cut) == "blocks.1.layers.2"
    assert inner_layer("blocks.1.out", cut) == "blocks.1"


def test_equal_layers_and_single_sites_are_not_cut(captured: Callable[[str], Captured]) -> None:
    assert cut_layers(captured("llama").graph.sites.network()) == frozenset()
    alone = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])})
    alone.forward = lambda x: alone["layers"][0](x)  # type: ignore[assignment,index]
    assert cut_layers(peftfx.capture(alone, {"x": torch.randn(2, 4)}).sites.network()) == frozenset()


def paths(sites: Sites, target: str) -> list[str]:
    return [match.site.path for match in sites.select(target)]


def test_targets_up_and_down_the_model() -> None:
    sites = peftfx.capture(Wider(), {"x": torch.randn(2, 4)}).sites
    assert paths(sites, "upstream(layers.1.0)") == ["layers.0.0", "layers.0.2"]
    assert paths(sites, "downstream(layers.1.0)") == ["layers.1.2", "layers.2.0", "layers.2.2"]
    assert paths(sites, "between(layers.0.2, layers.2.0)") == ["layers.1.0", "layers.1.2"]
    assert paths(sites, "~downstream( layers.1.0 | layers.0.2 )") == ["layers.0.0", "layers.0.2"]
    assert paths(sites, "upstream(downstream(layers.1.2))") == paths(sites, "/layers.[01].*/ | layers.2.0")
    adapted = peftfx.transform(Wider(), "lora(r=2)@between(layers.0.2, layers.2.0)", inputs={"x": torch.randn(2, 4)})
    assert [p.key for p in adapted.adapter("default").placements] == ["layers.1.0", "layers.1.2"]


def test_a_target_that_cannot_be_read_or_asked() -> None:
    sites = peftfx.capture(Wider(), {"x": torch.randn(2, 4)}).sites
    for target, said in (
        ("upstream(layers.0.0", r"expected '\)'"),
        ("between(layers.0.0)", "expected ',' and another target"),
        ("upstream(layers.0.0, layers.1.0)", r"expected '\)'"),
        ("upstream()", "expected a role"),
        ("upstream(layers.0.0)", "matches no site"),
    ):
        with pytest.raises(PeftfxError, match=said):
            sites.select(target)
    with pytest.raises(PeftfxError, match="not known"):
        sites.filter(kind="linear").select("upstream(layers.1.0)")
    with pytest.raises(PeftfxError, match="needs the model"):
        select(list(sites), target="upstream(layers.1.0)")
    named = Sites((Site("upstream", "linear", "linear", None, "", None, (2, 2), False, (), ()),))
    assert named.select("upstream")[0].site.path == "upstream"


def test_a_large_network_is_no_quadratic_work() -> None:
    """A residual stream of 7,000 layers, 21,000 nodes: made, asked and cut in seconds at most."""
    count = 7_000
    sites = tuple(
        Site(f"l.{i}.{name}", "linear", "linear", i, "", None, (4, 4), False, (), (Call("", "", ""),))
        for i in range(count)
        for name in "ab"
    )
    junctions = [Junction("x", "input"), *(Junction(f"add_{i}", "join", f"l.{i}") for i in range(count))]
    first = 2 * count
    links = [Link(first, 0, ()), Link(first + count, 2 * count + 1 + count, ())]
    for i in range(count):
        links += [Link(2 * i, 2 * i + 1, ("relu",)), Link(2 * i + 1, first + 1 + i, ("add",))]
        links += [Link(first + 1 + i, 2 * i + 2, ())] if i + 1 < count else []
    flow = Dataflow((*junctions, Junction("y", "output")), tuple(links))
    start = time.process_time()
    found = Sites(sites, flow=flow)
    assert len(found.select("between(l.0.a, l.6999.b)")) == 2 * count - 2
    made = time.process_time() - start
    assert len(found.layer_ends()) == count
    assert len(found.equal_layers()) == 1
    assert made < 3
    assert time.process_time() - start < 15
    assert make_network(sites, flow).number_of_nodes() == 3 * count + 2


class Block(nn.Module):
    """Two convs beside a third one, added."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.beside = nn.Conv2d(inner, outer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.beside(x) + self.two(torch.relu(self.one(x)))


class Skipping(nn.Module):
    """A small U-Net: what each block on the way down gives, a block on the way up reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block(3, 8), Block(8, 16)])
        self.mid = Block(16, 16)
        self.up = nn.ModuleList([Block(32, 8), Block(16, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = self.mid(x)
        for block in self.up:
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return x


def test_skips_of_a_unet_are_edges_and_what_they_pass_by_is_no_end() -> None:
    model = Skipping().eval()
    sites = peftfx.inspect(model, inputs={"x": torch.randn(1, 3, 16, 16)})
    network = sites.network()
    joins = {network.nodes[n]["path"]: n for n in network if n.startswith("join:")}
    for down, up in (("down.0", "up.1"), ("down.1", "up.0")):
        for conv in ("one", "beside"):
            assert network.edges[joins[down], f"{up}.{conv}"]["ops"] == ("cat",)
    assert not network.has_edge(joins["down.0"], "up.0.one")
    # What down.1 and mid give has a way around it, from down.0 to up.1.
    assert sites.layer_ends() == {"down.0": joins["down.0"], "up.1": joins["up.1"]}
    between = [match.site.path for match in sites.select("between(down.1.two, up.1.one)")]
    assert between == [f"{block}.{conv}" for block in ("mid", "up.0") for conv in ("beside", "one", "two")]
