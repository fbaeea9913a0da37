"""Running modules: which modules a graph calls, and what reads the parameters of modules that are no sites.

The texts are for messages: a module that runs but is no site cannot be adapted, and a user wants to know why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from peftfx.analysis.dataflow import op_name
from peftfx.analysis.stored_weights import operations_reading
from peftfx.analysis.weight_ops import module_path, runs_in
from peftfx.bases.guests import own_modules
from peftfx.errors import PeftfxError
from peftfx.graph.graph import BASE, Graph
from peftfx.graph.places import above, places_of
from peftfx.sites.site import EXPERTS, WEIGHT_KINDS, Site

#: By a parameter's id, the path of each module that has it, and its name there.
Owners: TypeAlias = "dict[int, list[tuple[str, str]]]"
_REGIONS = {
    "wrap_with_autocast": "it runs under torch.autocast",
    "wrap_with_set_grad_enabled": "it runs under torch.no_grad",
}
#: Why HF PEFT's layer, which replaces a module, would act differently from an adapter of the operation on the weight.
_PAST = "the model's code runs it, or reads its weight, past its call: HF PEFT's may not act there until it is merged"
_HOOKED = "its hooks change what goes in or out: here of the adapted layer, in HF PEFT of the layer without its adapter"
_MORE = (
    "its own code computes more than the operation on its weight: here around the adapted weight, in HF PEFT within "
    "the layer without its adapter"
)
#: The layers that HF PEFT wraps: their forward is one operation on their weight.
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
#: Operations that do not change a value, but its dtype, shape or place.
_PLAIN = frozenset(
    {
        *("to", "_to_copy", "type_as", "alias", "detach", "contiguous", "clone", "view", "reshape", "flatten"),
        *("unsqueeze", "squeeze", "transpose", "permute", "t"),
    }
)
_COMPILED = "torch.compile keeps the layer that HF PEFT replaces: its adapter does nothing until it is merged"
_HELD = (
    "the model also holds it outside its tree of modules (in a list, for example), where HF PEFT replaces nothing: "
    "if its code runs it from there, HF PEFT's adapter does nothing until it is merged"
)
#: Not of a method for which HF PEFT has a special layer around the attention: see `Method.wraps_attention`.
READ_BY_ATTENTION = "torch's attention reads its weight past HF PEFT's layer, until it is merged"
_FUSED = "in eval mode torch's encoder layer reads its weights past HF PEFT's layer, until it is merged"


def called_modules(module: fx.GraphModule) -> frozenset[str]:
    """Return the paths of the modules that a captured program calls, and of their parents."""
    paths: set[str] = set()
    for node in _all_nodes(module):
        for entry in (node.meta.get("nn_module_stack") or {}).values():
            path = entry[0].partition("@")[0]
            if path.partition(".")[0] == BASE:
                paths.add(path.removeprefix(BASE).removeprefix("."))
    return frozenset(paths)


def run_elsewhere(base: nn.Module, called: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return, for each module that runs under its first path, the other paths under which it runs too."""
    runs = {path: tuple(name for name in names if name in called) for path, names in places_of(base).items()}
    return {path: tuple(n for n in names if n != path) for path, names in runs.items() if path in names and names[1:]}


def parameter_reads(graph: Graph, sites: Iterable[Site]) -> dict[str, str]:
    """Return, for each module that is no site but has a parameter that the graph reads, what reads it.

    A tensor with several owners counts for the owner whose code reads it. If the code belongs to no owner, the tensor
    counts for the owners inside the code's module.
    """
    owners = owners_of(graph.base)
    adapted = {site.path for site in sites if site.weight}
    found: dict[str, str] = {}
    for node in graph.nodes():
        if node.op != "get_attr" or not str(node.target).startswith(f"{BASE}."):
            continue
        holders = owners.get(id(graph.get(str(node.target))), [])
        for user in node.users:
            for owner, name in owners_read(holders, module_path(user)):
                if owner not in adapted and f"{owner}.{name}".removeprefix(".") not in adapted:
                    found.setdefault(owner, _how(name, user))
    return found


def read_past(graph: Graph, sites: Iterable[Site]) -> dict[str, str]:
    """Return, for each parameter of a weight's site that something else than the site's operation reads: what."""
    owners = owners_of(graph.base)
    reads = {str(node.target): node for node in graph.nodes() if node.op == "get_attr"}
    found: dict[str, str] = {}
    for site in sites:
        if site.kind not in (*WEIGHT_KINDS, EXPERTS):
            continue
        owner, _, name = site.parameter.rpartition(".")
        holders = owners.get(id(graph.get(site.weight)), [])
        for user in operations_reading(reads[site.weight]):
            own = user.name in {call.op for call in site.calls}
            if not own and (owner, name) in owners_read(holders, module_path(user)):
                found.setdefault(site.parameter, op_name(user))
    return found


def region_reads(graph: Graph) -> dict[str, str]:
    """Return, for each site whose weight the code of a region reads too, the region. No adapter acts in a region."""
    weights = {str(site.weight): site.path for site in graph.sites if site.weight}
    reads = [node for node in graph.nodes() if node.op == "get_attr" and str(node.target) in weights]
    pairs = ((weights[str(node.target)], _REGIONS.get(op_name(user))) for node in reads for user in node.users)
    return {path: region for path, region in pairs if region is not None}


def owners_of(base: nn.Module) -> Owners:
    """Return, by a parameter's id, the path of each module that has the parameter, and its name there."""
    owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for path, module in own_modules(base):
        for name, p in module._parameters.items():
            if p is not None:
                owners[id(p)].append((path, name))
    return owners


def owners_read(holders: list[tuple[str, str]], reader: str) -> list[tuple[str, str]]:
    """Return those of a tensor's owners from which code of the module `reader` reads it: itself, or modules inside."""
    exact = [holder for holder in holders if holder[0] == reader]
    return exact or [holder for holder in holders if not reader or f"{holder[0]}.".startswith(f"{reader}.")] or holders


def _how(name: str, user: fx.Node) -> str:
    region = _REGIONS.get(op_name(user))
    if region is not None:
        return region
    code = module_path(user)
    if name == "weight" and op_name(user) in ("linear", "addmm", *(f"conv{n}d" for n in (1, 2, 3))):
        return f"{op_name(user)} applies its weight to a value, or with a bias, that is not told apart from it"
    return f"its {name} is read by {op_name(user)} in the code of {code or 'the model'}"


def _all_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield the nodes of a graph and of the regions in it."""
    for node in module.graph.nodes:
        yield node
        if node.op == "get_attr":
            inner = _attribute(module, str(node.target))
            if isinstance(inner, fx.GraphModule):
                yield from _all_nodes(inner)


def _attribute(module: nn.Module, target: str) -> object:
    value: object = module
    for part in target.split("."):
        value = getattr(value, part)
    return value if not isinstance(value, torch.Tensor) else None


def passed_by(graph: Graph, sites: Iterable[Site]) -> dict[str, str]:
    """Return, for each site where HF PEFT's layer acts differently from an adapter of the operation, the reason."""
    modules = dict(own_modules(graph.base, remove_duplicate=False))
    nodes = {node.name: node for node in graph.nodes()}
    held = {id(module) for holder in modules.values() for module in _held(holder)}
    found = {}
    for site in sites:
        module = modules.get(site.path)
        if site.kind in WEIGHT_KINDS and module is not None:
            around = [modules[p] for p in above(site.path)]
            found[site.path] = _why(site, module, around, nodes) or (_HELD if id(module) in held else "")
    return {path: why for path, why in found.items() if why}


def refuse_other_readers(merged: Graph, sites: Iterable[Site], tied: Collection[str]) -> None:
    """Refuse to merge in place where the model's code reads the weight elsewhere too.

    Args:
        merged: the graph in which all adapted sites are merged.
        sites: the adapted sites.
        tied: paths of sites whose weights other modules share. These sites get weights of their own.

    Raises:
        PeftfxError: something other than the sites' operations reads a weight. It would then read the merged weight.
    """
    live: set[fx.Node] = set()
    for node in reversed(list(merged.nodes())):
        if node.op == "output" or node.is_impure() or live & node.users.keys():
            live.add(node)
    readers = {str(node.target): node.users.keys() & live for node in live if node.op == "get_attr"}
    for site in sites:
        if (users := readers.get(str(site.weight))) and site.path not in tied:
            how = ", ".join(sorted({op_name(user) for user in users}))
            what = f"the model's code also reads this weight in another way ({how}), and would read the merged one"
            hint = "export it, which changes the layer alone; or leave it unmerged, or out of the rule"
            raise PeftfxError(what, site.path, hint)


def _held(holder: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a module has as attributes, or in lists and tables, but not as its own modules."""
    for name, value in vars(holder).items():
        if name != "_modules":
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            yield from (item for item in items if isinstance(item, nn.Module))


def _why(site: Site, module: nn.Module, above: list[nn.Module], nodes: dict[str, fx.Node]) -> str:
    if any(isinstance(one, nn.TransformerEncoderLayer) for one in above):
        return _FUSED
    if isinstance(above[-1], nn.MultiheadAttention) or isinstance(module, nn.MultiheadAttention):
        return READ_BY_ATTENTION if isinstance(module, nn.Linear) else ""
    if isinstance(above[-1], torch._dynamo.OptimizedModule):
        return _COMPILED
    for call in site.calls:
        if not runs_in(nodes[call.op], site.path):
            return _PAST
        before = runs_in(nodes[call.x], site.path)
        after = any(runs_in(user, site.path) for user in nodes[call.y].users)
        if (before and module._forward_pre_hooks) or (after and module._forward_hooks):
            return _HOOKED
        own = isinstance(module, LAYERS) and not type(module).__module__.startswith("torch.nn")
        if not own or hasattr(module, "embed_scale"):  # HF PEFT scales the adapter's part of an embedding, too
            continue
        if _is_changed(nodes[call.x], site.path, back=True) or _is_changed(nodes[call.y], site.path, back=False):
            return _MORE
    return ""


def _is_changed(node: fx.Node, path: str, *, back: bool) -> bool:
    """Return whether the module's own code computes with a value before its operation, or after it.

    A cast or another shape is no change.

    Args:
        node: what the operation takes, if `back`; otherwise what it gives.
        path: the module's path.
        back: whether to look before the operation.
    """
    steps = [node] if back else list(node.users)
    own = [step for step in steps if step.op == "call_function" and runs_in(step, path)]
    if any(op_name(step) not in _PLAIN for step in own):
        return True
    return any(_is_changed(n, path, back=back) for step in own for n in (step.all_input_nodes if back else [step]))
