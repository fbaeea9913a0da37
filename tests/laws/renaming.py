"""A graph whose modules have other names, and what of a site has nothing to do with its name."""

from __future__ import annotations

import random
from collections.abc import Callable

from torch import fx, nn

from peftfx.analysis.roles import find_sites
from peftfx.graph.graph import BASE, Graph
from peftfx.graph.linking import link
from peftfx.sites.site import Site
from peftfx.sites.sites import Sites
from peftfx.testing.cases import Case
from peftfx.testing.pool import captured


def identity(site: Site) -> tuple[object, ...]:
    return site.kind, site.role, site.layer, site.shape, site.transposed, site.parts, site.calls


def renamed(graph: Graph) -> Graph:
    """The graph of the same model with every word in every module path replaced by a random one."""
    letters, words = random.Random(0), dict[str, str]()

    def rename(path: str) -> str:
        return ".".join(
            word if word.isdigit() else words.setdefault(word, nonsense(letters)) for word in path.split(".")
        )

    twin = nn.Module()
    for path, module in graph.base.named_modules():
        owner = twin
        for component in rename(path).split(".") if path else ():
            if component not in owner._modules:
                owner.add_module(component, nn.Module())
            owner = owner.get_submodule(component)
        owner._parameters, owner._buffers = module._parameters, module._buffers
    clone = graph.clone()
    for node in clone.nodes():
        rename_node(node, rename)
    holders = {**dict(clone.module.named_children()), BASE: twin}
    clone.module = link(clone.module.graph, holders)
    return clone


def nonsense(letters: random.Random) -> str:
    return "".join(letters.choices("bcdfghjklmnpqrstvwxz", k=8))


def renamed_module(path: str, rename: Callable[[str], str]) -> str:
    path, at, count = path.partition("@")
    inner = path.removeprefix(f"{BASE}.")
    return path + at + count if inner == path else f"{BASE}.{rename(inner)}{at}{count}"


def rename_node(node: fx.Node, rename: Callable[[str], str]) -> None:
    if node.op == "get_attr" and str(node.target).startswith(f"{BASE}."):
        path, _, name = str(node.target).removeprefix(f"{BASE}.").rpartition(".")
        node.target = ".".join(filter(None, (BASE, rename(path) if path else "", name)))
    stack = node.meta.get("nn_module_stack", {})
    node.meta["nn_module_stack"] = {key: (renamed_module(path, rename), kind) for key, (path, kind) in stack.items()}


def roles(case: Case, finder: Callable[[Graph], Sites] = find_sites) -> None:
    """The sites of a model whose modules are all renamed are the same but for their paths."""
    graph = captured(case.spec).graph
    assert [identity(s) for s in finder(renamed(graph))] == [identity(s) for s in finder(graph)]
