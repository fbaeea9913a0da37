"""Choose a bit width for each role, so that the weights fit into a budget of bytes and the outputs change least.

The cost of each role is measured: its weights are rounded in torch, all others are not, and the outputs are compared.
The cost is the KL divergence in nats on a text if the model gives logits, otherwise the squared error relative to the
squared outputs. Costs are assumed to add up. Of all choices that fit into the budget, the one with the smallest sum is
taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch
from torch import Tensor, nn

from peftfx.errors import PeftfxError
from peftfx.export.coded.rounded import Choose, columns_of, read_weight, roundable, rounded_rows
from peftfx.export.metadata import SOURCE
from peftfx.export.rounding.calibrated import layer_at
from peftfx.export.verification.agreement import LOGITS, chooses, divergence
from peftfx.export.verification.comparison import Reference
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export.writing.readers import lookups
from peftfx.export.writing.weights import LARGE, content_of
from peftfx.export_options.quantize import Scheme
from peftfx.graph.graph import DERIVED
from peftfx.memory.pages import PAGE
from peftfx.model.adapted import AdaptedModel
from peftfx.sites.sites import Sites

_NONE = "none"
_AT_ONCE = 1 << 22  #: how many numbers of a weight are rounded at a time


@dataclass(frozen=True)
class Share:
    """The share of a role in a budget of bytes.

    Attributes:
        role: the role of the weights.
        scheme: the scheme that rounds them, or `none`.
        bytes: their size in the file, in bytes.
        costs: how far the outputs changed when only these weights were rounded, by scheme.
        reason: why this scheme was chosen.
        weights: the number of weights.
    """

    role: str
    scheme: str
    bytes: int
    costs: Mapping[str, float]
    reason: str
    weights: int

    def __str__(self) -> str:
        told = ", ".join(f"{cost:.1e} as {name}" for name, cost in self.costs.items())
        return f"{self.role} {self.scheme} ({told})" if told else f"{self.role} {self.scheme} ({self.reason})"


@dataclass
class _Role:
    """The weights of a role, and what rounding them costs.

    Attributes:
        weights: the weights of products, and whether each is stored [out, in].
        modules: the paths of the modules that multiply by each weight, by its name.
        costs: the measured costs, by scheme.
        why: why the weights cannot be rounded; empty if they can.
    """

    weights: list[tuple[ir.Value, bool]] = field(default_factory=list)
    modules: dict[str, list[str]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    why: str = ""

    def takes(self, scheme: Scheme) -> bool:
        """Say whether all weights are at least as wide as a block of the scheme."""
        return all(columns_of(weight, transposed) >= scheme.block for weight, transposed in self.weights)

    def bytes(self, scheme: Scheme | None) -> int:
        return sum(_bytes(weight, transposed, scheme) for weight, transposed in self.weights)


def share_out(
    limit: int,
    programs: Sequence[tuple[ir.Model, Sites]],
    adapted: AdaptedModel,
    reference: Reference,
    feeds: Sequence[Tensors],
    schemes: Sequence[Scheme],
) -> tuple[Choose, Choose, list[Share]]:
    """Choose each weight's scheme within a budget. Return this choice, that of weights in no role, and the shares.

    Args:
        limit: the most bytes of all weights.
        programs: the merged ONNX programs, each with the sites whose roles count. They may share weights.
        adapted: the model in torch, whose modules are hooked.
        reference: computes the model's outputs, by name.
        feeds: the calls at which costs are measured.
        schemes: the schemes to choose from, besides no rounding.

    Raises:
        PeftfxError: the weights fit as they are, or even the smallest choice does not fit.
    """
    roles = _roles(programs, schemes)
    values = {content_of(v): v.const_value for program, _ in programs for v in program.graph.initializers.values()}
    unrounded = sum(_in_file(tensor.nbytes) for tensor in values.values() if tensor is not None)
    if unrounded <= limit:
        what = f"the weights take {unrounded:,} bytes as they are, {limit:,} are allowed: nothing needs to be rounded"
        raise PeftfxError(what, "budget", "leave budget out, or allow less")
    others = unrounded - sum(role.bytes(None) for role in roles.values())
    by_name = {str(scheme): scheme for scheme in schemes}
    wants = [reference(feed) for feed in feeds]
    for role in roles.values():
        for name, scheme in by_name.items():
            if not role.why and role.takes(scheme):
                _measure(role, name, scheme, adapted.base, reference, feeds, wants)
    found = _least(roles, by_name, limit - others)
    if found is None:
        smallest = others + sum(
            min(role.bytes(by_name.get(name)) for name in (_NONE, *role.costs)) for role in roles.values()
        )
        what = f"the smallest way takes {smallest:,} bytes, {limit:,} are allowed"
        raise PeftfxError(what, "budget", f"allow {-(-smallest // 1000)}kB or more")
    chosen = {
        weight.meta.get(SOURCE): by_name[name]
        for path, name in found.items()
        if name != _NONE
        for weight, _ in roles[path].weights
    }
    shares = [_share(path, role, found[path], by_name, limit) for path, role in roles.items()]
    known = {weight.meta.get(SOURCE) for role in roles.values() for weight, _ in role.weights}
    return chosen.get, lambda source: None if source in known else schemes[0], shares


def _roles(programs: Sequence[tuple[ir.Model, Sites]], schemes: Sequence[Scheme]) -> dict[str, _Role]:
    block = min(scheme.block for scheme in schemes)
    found: dict[object, tuple[ir.Value, bool, list[tuple[str, str]]]] = {}
    others: dict[object, bool] = {}
    for program, sites in programs:
        owners: dict[object, list[tuple[str, str]]] = {}
        for site in sites.weights:
            for source in {site.weight, f"{DERIVED}.{site.path}.weight"}:
                owners.setdefault(source, []).append((site.role, site.path))
        for weight, transposed, alone in roundable(program, block):
            source = weight.meta.get(SOURCE, weight)
            _, _, own = found.setdefault(source, (weight, transposed, []))
            own += [pair for pair in owners.get(source, []) if pair not in own]
            others[source] = others.get(source, False) or not alone
    for program, _ in programs:  # one graph may look up rows of a weight that another multiplies by
        products = {weight for weight, _, _ in roundable(program, block)}
        for weight in program.graph.initializers.values():
            source = weight.meta.get(SOURCE, weight)
            if source in found and weight not in products:
                others[source] = others[source] or len(list(lookups(weight))) < len(list(weight.uses()))
    roles: dict[str, _Role] = {}
    for which, (weight, transposed, own) in found.items():
        multiplied = [role for role, _ in own if not role.startswith("embedding")]
        role = roles.setdefault(next(iter(multiplied), own[0][0]) if own else "no role", _Role())
        role.weights.append((weight, transposed))
        role.modules[str(weight.name)] = [path for _, path in own]
        if not own:
            role.why = "no layer reads them alone"
        elif others[which]:
            role.why = "something else than a product reads one, and would keep it in floating point beside the codes"
    return dict(sorted(roles.items()))


def _bytes(weight: ir.Value, transposed: bool, scheme: Scheme | None) -> int:
    assert weight.const_value is not None
    if scheme is None:
        return _in_file(weight.const_value.nbytes)
    assert weight.shape is not None
    rows, columns = (int(str(size)) for size in (weight.shape if transposed else reversed(list(weight.shape))))
    blocks = -(-columns // scheme.block)
    scales = rows * blocks * (weight.const_value.nbytes // (rows * columns))
    return _in_file(rows * blocks * scheme.block * scheme.bits // 8) + _in_file(scales)


def _in_file(size: int) -> int:
    """Return the most bytes that a tensor of this size takes in a file: a large tensor starts on a page."""
    return size + PAGE if size >= LARGE else size


@torch.no_grad()
def _measure(
    role: _Role,
    name: str,
    scheme: Scheme,
    base: nn.Module,
    reference: Reference,
    feeds: Sequence[Tensors],
    wants: Sequence[Tensors],
) -> None:
    """Record how far the outputs change when only these weights are rounded, or why this cannot be measured."""
    ran: set[str] = set()
    with ExitStack() as stack:
        for weight, transposed in role.weights:
            for path in role.modules[str(weight.name)]:
                module = layer_at(base, path)
                if module is None:
                    role.why = f"{path} is no linear layer: what it costs to round it cannot be measured"
                    return
                hook = _hook(path, weight, transposed, scheme, ran)
                stack.callback(module.register_forward_hook(hook).remove)
        total = sum(_distance(want, reference(feed), feed) for want, feed in zip(wants, feeds, strict=True))
    still = sorted({path for paths in role.modules.values() for path in paths} - ran)
    if still:
        role.why = f"{still[0]} did not run: what it costs to round it cannot be measured"
    else:
        role.costs[name] = total / len(feeds)


def _hook(path: str, weight: ir.Value, transposed: bool, scheme: Scheme, ran: set[str]) -> Callable[..., Tensor]:
    def add(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        ran.add(path)
        value = read_weight(weight, transposed)
        if isinstance(module, nn.Embedding):
            rows = value[args[0]].flatten(0, -2)
            return y + (rounded_rows(rows, scheme).float() - rows.float()).view(y.shape).to(y.dtype)
        parts = []
        for some in value.split(max(1, _AT_ONCE // value.shape[1])):
            off = rounded_rows(some, scheme).float() - some.float()
            parts.append(args[0] @ off.T.to(args[0].dtype))
        return y + torch.cat(parts, -1)

    return add


def _distance(want: Tensors, got: Tensors, feed: Tensors) -> float:
    if chooses(want):
        return divergence(want[LOGITS], got[LOGITS], feed.get("attention_mask"))
    floats = [(value.double(), got[name].double()) for name, value in want.items() if value.is_floating_point()]
    off = sum(float(((a - b)[a.isfinite()] ** 2).sum()) for a, b in floats)
    return off / max(sum(float((a[a.isfinite()] ** 2).sum()) for a, _ in floats), 1e-30)


def _least(roles: Mapping[str, _Role], schemes: Mapping[str, Scheme], room: int) -> dict[str, str] | None:
    """Choose each role's scheme: of the choices that fit, the one with the least sum of costs; None if none fits."""
    ways: list[tuple[int, float, dict[str, str]]] = [(0, 0.0, {})] if room >= 0 else []
    for path, role in roles.items():
        options = [(role.bytes(None), 0.0, _NONE), *((role.bytes(schemes[n]), c, n) for n, c in role.costs.items())]
        longer = [(a + b, c + d, {**picks, path: name}) for a, c, picks in ways for b, d, name in options]
        ways, best = [], float("inf")
        for way in sorted((way for way in longer if way[0] <= room), key=lambda way: way[:2]):
            if way[1] < best:  # a larger choice that is no better is dropped
                ways.append(way)
                best = way[1]
    return ways[-1][2] if ways else None


def _share(path: str, role: _Role, name: str, schemes: Mapping[str, Scheme], limit: int) -> Share:
    if role.why:
        reason = role.why
    elif name == _NONE:
        reason = f"{limit:,} bytes leave room for it"
    else:
        reason = "of the ways that fit, the least sum has it"
    return Share(path, name, role.bytes(schemes.get(name)), dict(role.costs), reason, len(role.weights))


def candidates() -> tuple[Scheme, ...]:
    """Return the schemes that a budget chooses from, besides no rounding."""
    return Scheme("int8"), Scheme("int4"), replace(Scheme("int4"), block=128)
