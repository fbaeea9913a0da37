"""Adapter: the named, trainable state of one transform: site path -> parameter name -> tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftfx.attending import ATTENTION, AttentionMethod, key_weight
from peftfx.derived import Block, part_site
from peftfx.errors import PeftfxError
from peftfx.method import Base, Method, WeightMethod
from peftfx.sites import Part, Site
from peftfx.soft import SEQUENCE, SequenceMethod, embedding_path


@dataclass(frozen=True)
class Placement:
    """A method at a site, or at one part of a fused site."""

    method: WeightMethod | AttentionMethod | SequenceMethod
    site: Site
    part: Part | None = None

    @property
    def key(self) -> str:
        """Where its parameters are in the adapter: the site's path, and the part's role in short."""
        if self.site.kind == SEQUENCE:
            return SEQUENCE
        if self.site.kind == ATTENTION:
            return self.site.path or ATTENTION  # a module without a path computes it itself
        return self.site.path if self.part is None else f"{self.site.path}.{self.part.role.rpartition('.')[2]}"

    @property
    def block(self) -> Block | None:
        """The rows of the part."""
        if self.part is None:
            return None
        return Block.of(self.part, self.site.shape[1 if self.site.transposed else 0])

    @property
    def view(self) -> Site:
        """The site as the method sees it."""
        return self.site if self.part is None else part_site(self.site, self.part, self.block)  # type: ignore[arg-type]

    def init(self, base: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        """New parameters for this place in the base module."""
        if isinstance(self.method, SequenceMethod):
            return self.method.init(self.site, base.get_submodule(embedding_path(self.site)), rng)
        if isinstance(self.method, AttentionMethod):
            return self.method.init(self.site, key_weight(base, self.site), rng)
        return self.method.init(self.view, self.base(*site_tensors(base, self.site)), rng)

    def base(self, weight: Tensor, bias: Tensor | None) -> Base:
        """The site's tensors as the method sees them: [out, in], and the part's rows alone."""
        weight = weight.T if self.site.transposed else weight
        if self.block is None:
            return Base(weight, bias)
        return Base(self.block.take(weight, 0), None if bias is None else self.block.take(bias, 0))


@dataclass(frozen=True)
class Override:
    """A tensor of the base that an adapter replaces by one of its own, within one module.

    Attributes:
        key: where the adapter keeps its tensor, a dotted name.
        module: the module path within which uses of the base's tensor are replaced.
        name: the tensor's name, relative to the module.
    """

    key: str
    module: str
    name: str


@dataclass(frozen=True)
class Placed:
    """A rule resolved against a model.

    Attributes:
        method: as the rule has it.
        placements: where it acts.
        overrides: the base's tensors it trains copies of (`modules_to_save`, `bias`).
    """

    method: Method
    placements: tuple[Placement, ...]
    overrides: tuple[Override, ...] = ()


class Adapter(nn.Module):
    """The state of one adapter. Parameters live in modules that mirror the base's paths.

    Attributes:
        placed: the rules it was made from, with where they act.
        records: what a loaded config said of the base and the task; saved again with it.
    """

    def __init__(self, placed: Sequence[Placed], config: Mapping[str, object] | None = None) -> None:
        super().__init__()
        kept = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
        self.records = {k: v for k, v in (config or {}).items() if k in kept}
        self.placed = tuple(placed)

    @property
    def rules(self) -> tuple[Method, ...]:
        """The methods of its rules."""
        return tuple(rule.method for rule in self.placed)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where its rules act."""
        return tuple(p for rule in self.placed for p in rule.placements)

    @property
    def overrides(self) -> tuple[Override, ...]:
        """The base's tensors it trains copies of, once each however many rules name one."""
        return tuple({o.key: o for rule in self.placed for o in rule.overrides}.values())

    def create(self, base: nn.Module, rng: torch.Generator | None) -> None:
        """Make every parameter, at its method's initial values; overrides start as copies of the base's tensors."""
        for placement in self.placements:
            with torch.no_grad():
                params = placement.init(base, rng)
            for name, value in params.items():
                self.put(f"{placement.key}.{name}", value, trained=name not in placement.method.frozen())
        self.copy_overridden(base)

    def copy_overridden(self, base: nn.Module) -> None:
        """Start the overrides as copies of the base's tensors."""
        for override in self.overrides:
            owner, leaf = owner_of(base.get_submodule(override.module), override.name)
            tensor = getattr(owner, leaf)
            self.put(override.key, tensor.detach().clone(), trained=leaf in owner._parameters)

    def params(self, placement: Placement) -> dict[str, Tensor]:
        """The parameters of one placement by name, constants included."""
        remembered = placement.method.remembered()
        return {name: t for name, t in self.all_of(placement).items() if name not in remembered}

    def all_of(self, placement: Placement) -> dict[str, Tensor]:
        """The parameters of one placement, and what training remembers beside them."""
        holder = self.get_submodule(placement.key)
        return {**dict(holder.named_parameters(recurse=False)), **dict(holder.named_buffers(recurse=False))}

    def penalty(self) -> Tensor | None:
        """What its rules add to the model's loss: each the mean over its places."""
        total = None
        for rule in self.placed:
            terms = [p.method.penalty(self.params(p)) for p in rule.placements]
            found = [term for term in terms if term is not None]
            if found:
                mean = torch.stack(found).mean()
                total = mean if total is None else total + mean
        return total

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Make room for what a saved state remembers, by dotted names, and forget what it does not."""
        for placement in self.placements:
            holder = self.get_submodule(placement.key)
            device = next((p.device for p in holder.parameters(recurse=False)), None)
            for name in placement.method.remembered():
                key = f"{placement.key}.{name}"
                if name in holder._buffers:
                    delattr(holder, name)
                if key in state:
                    self.put(key, torch.empty_like(state[key], device=device), trained=False)

    def put(self, key: str, value: Tensor, *, trained: bool = True) -> None:
        """Keep a tensor under a dotted name."""
        path, _, name = key.rpartition(".")
        holder: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        if trained:
            holder.register_parameter(name, nn.Parameter(value))
        else:
            holder.register_buffer(name, value)

    def add(self, other: Adapter) -> None:
        """Take another adapter's rules, behind this one's, with their tensors."""
        self.placed += other.placed
        self.records = {**other.records, **self.records}
        trained = {name for name, _ in other.named_parameters()}
        for name, value in other.tensors():
            self.put(name, value.detach(), trained=name in trained)

    def get(self, key: str) -> Tensor:
        """The tensor kept under a dotted name."""
        value = getattr(*owner_of(self, key))
        assert isinstance(value, Tensor)
        return value

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its dotted name."""
        yield from self.named_parameters()
        yield from self.named_buffers()


def whole(
    base: nn.Module, adapter: Adapter, group: Sequence[Placement]
) -> tuple[WeightMethod | AttentionMethod, Mapping[str, Tensor]]:
    """A method and parameters that do at a whole site what the placements of this group do there, or at its parts."""
    first = group[0]
    assert isinstance(first.method, WeightMethod | AttentionMethod)
    if isinstance(first.method, AttentionMethod):
        return first.method, adapter.params(first)
    if first.part is None:
        return first.method.written(adapter.all_of(first))
    parts = {p.part.rows: _written(adapter, p) for p in group if p.part is not None}
    return first.method.whole(
        first.site, dataclasses.replace(first, part=None).base(*site_tensors(base, first.site)), parts
    )


def _written(adapter: Adapter, placement: Placement) -> dict[str, Tensor]:
    assert isinstance(placement.method, WeightMethod)
    return placement.method.written(adapter.all_of(placement))[1]


def site_tensors(base: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """The weight, as it is stored, and the bias of a site in the base module."""
    weight = getattr(*owner_of(base, site.weight.partition(".")[2]))
    bias = None if site.bias is None else getattr(*owner_of(base, site.bias.partition(".")[2]))
    return weight, bias


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a tensor of this dotted name, and the name's last part."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def check_name(name: str) -> None:
    """An adapter's name is a folder's and an attribute's."""
    if not name.isidentifier():
        raise PeftfxError(f"not a name for an adapter: {name!r}", "adapter_name", "use letters, digits and underscores")
