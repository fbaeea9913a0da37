"""Adapter: the named, trainable state of one transform: site path -> parameter name -> tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftfx.contract.method import Method
from peftfx.contract.override import Override
from peftfx.contract.placed import SHARED, Placed, Placements, shared_by
from peftfx.contract.placement import Placement, owner_of
from peftfx.errors import PeftfxError
from peftfx.sharding import full, is_part


@dataclass(frozen=True)
class Account:
    """What became of each tensor of the file that a rule was loaded from, by its name there.

    Attributes:
        taken: where the adapter keeps it.
        repeats: those that only repeat what the base or the file has anyway.
        unused: those of modules that never run: they change nothing, and are saved again as they were.
    """

    taken: Mapping[str, str]
    repeats: tuple[str, ...]
    unused: Mapping[str, Tensor]


class Holder(nn.Module):
    """A module of an adapter's tree.

    Attributes:
        hosted: whether a module of the base has it as a child too. It is that one's then, to who goes through children
            and must meet each parameter once, as `fully_shard` does.
    """

    hosted = False

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Those that no module of the base has."""
        return ((n, m) for n, m in super().named_children() if not (isinstance(m, Holder) and m.hosted))


class Adapter(Holder):
    """The state of one adapter. Parameters live in modules that mirror the base's paths.

    Attributes:
        placed: the rules it was made from, with where they act.
        records: what a loaded config said of the base and the task; saved again with it.
        accounts: of the rules that were loaded, by their numbers.
        named: the module paths that the keys of a loaded file name, whether or not a rule acts there.
        ran: of new adapters, the modules that the call ran from which the rules were placed.
    """

    def __init__(self, placed: Sequence[Placed], config: Mapping[str, object] | None = None) -> None:
        super().__init__()
        kept = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
        self.records = {k: v for k, v in (config or {}).items() if k in kept}
        self.named: frozenset[str] = frozenset()
        self.ran: frozenset[str] = frozenset()
        self.placed: tuple[Placed, ...] = ()
        self.accounts: dict[int, Account] = {}
        self._rule: dict[str, int] = {}
        self._take(placed)

    def _take(self, placed: Sequence[Placed]) -> None:
        for number, rule in enumerate(placed, len(self.placed)):
            self._rule |= {placement.key: number for placement in rule.placements}
        self.placed += tuple(placed)

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(type(rule).__name__ for rule in self.rules)) or "no rules"
        count = sum(p.numel() for p in self.parameters())
        return f"Adapter({kinds}: {len(self.placements)} places, {count:,} parameters)"

    @property
    def rules(self) -> tuple[Method, ...]:
        """The methods of its rules."""
        return tuple(rule.method for rule in self.placed)

    @property
    def placements(self) -> Placements:
        """Where its rules act."""
        return Placements(p for rule in self.placed for p in rule.placements)

    @property
    def overrides(self) -> tuple[Override, ...]:
        """The base's tensors it trains copies of, once each however many rules name one."""
        placed = [o for rule in self.placed for o in rule.overrides]
        return tuple({o.key: o for o in (*placed, *(o for p in self.placements for o in p.copies))}.values())

    def create(self, base: nn.Module, rng: torch.Generator | None) -> None:
        """Make every parameter, at its method's initial values; overrides start as copies of the base's tensors."""
        self.share(base, rng)
        for rule in self.placed:
            for placement in rule.placements:
                with torch.no_grad():
                    params = placement.init(base, rng, {n: self.get(key) for n, key in self._reads(placement).items()})
                self._holder(placement.key)  # a place may have nothing of its own beside what its rule shares
                for name, value in params.items():
                    trained = not placement.method.is_constant(name, value)
                    self.put(f"{placement.key}.{name}", value, trained=trained)
        self.copy_overridden(base)

    @torch.no_grad()
    def share(self, base: nn.Module, rng: torch.Generator | None = None) -> None:
        """Make what the places of each rule share."""
        for number, rule in enumerate(self.placed):
            for name, value in shared_by(rule, base, rng).items():
                self.put(shared_key(number, name), value, trained=not rule.method.is_constant(name, value))

    def copy_overridden(self, base: nn.Module) -> None:
        """Start the overrides as copies of the base's tensors."""
        for override in self.overrides:
            owner, leaf = owner_of(base.get_submodule(override.module), override.name)
            tensor = full(getattr(owner, leaf)).detach()
            if override.rows:
                _refuse_rows(override, len(tensor))
                indices = torch.tensor(override.rows, device=tensor.device)
                self.put(override.indices, indices, trained=False)
                tensor = tensor[indices]
            self.put(override.key, tensor.clone(), trained=override.trained and leaf in owner._parameters)

    def params(self, placement: Placement) -> dict[str, Tensor]:
        """The parameters of one placement by name, constants included, and those that its rule's places share."""
        return {name: self.get(key) for name, key in self.keys(placement).items()}

    def keys(self, placement: Placement) -> dict[str, str]:
        """The dotted name of each of them."""
        remembered = placement.method.remembered()
        own = {name: f"{placement.key}.{name}" for name in self.all_of(placement) if name not in remembered}
        return own | self._reads(placement)

    def _reads(self, placement: Placement) -> dict[str, str]:
        """What a placement reads of what its rule's places share: by its name there, where it is kept."""
        number = self._rule[placement.key]
        chosen = self.placed[number].reads(placement, self.shared(number))
        return {name: shared_key(number, kept) for name, kept in chosen.items()}

    def shared(self, number: int) -> dict[str, Tensor]:
        """What the places of a rule share, by name."""
        folder = self._modules.get(SHARED)
        rule = None if folder is None else folder._modules.get(str(number))
        return {} if rule is None else _tensors_of(rule)

    def all_of(self, placement: Placement) -> dict[str, Tensor]:
        """The parameters of one placement, and what training remembers beside them."""
        return _tensors_of(self.get_submodule(placement.key))

    def penalty(self) -> Tensor | None:
        """What its rules add to the model's loss: each the mean over its places."""
        total = None
        for rule in self.placed:
            if type(rule.method).penalty is Method.penalty:
                continue
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
        holder = self._holder(path)
        if trained:
            holder.register_parameter(name, nn.Parameter(value))
        else:
            holder.register_buffer(name, value)

    def _holder(self, path: str) -> nn.Module:
        """The module at a dotted path, made where there is none."""
        holder: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in holder._modules:
                holder.add_module(part, Holder())
            holder = holder.get_submodule(part)
        return holder

    def add(self, other: Adapter) -> None:
        """Take another adapter's rules, behind this one's, with their tensors."""
        first = len(self.placed)
        self._take(other.placed)
        self.records = {**other.records, **self.records}
        self.named |= other.named
        trained = {name for name, _ in other.named_parameters()}
        moved = {
            shared_key(number, name): shared_key(first + number, name)
            for number in range(len(other.placed))
            for name in other.shared(number)
        }
        for number, account in other.accounts.items():
            taken = {name: moved.get(key, key) for name, key in account.taken.items()}
            self.accounts[first + number] = dataclasses.replace(account, taken=taken)
        for name, value in other.tensors():
            self.put(moved.get(name, name), value.detach(), trained=name in trained)

    def gathered(self) -> Adapter:
        """The same with all of its tensors, of which each process may have a part; they are gathered one at a time."""
        if not any(is_part(tensor) for _, tensor in self.tensors()):
            return self
        made = Adapter(())
        made.add(self)
        made.ran, trained = self.ran, {name for name, _ in made.named_parameters()}
        own = dict(self.tensors())  # a copy of a parameter does not know what its parts are of
        for name in [name for name, _ in made.tensors()]:
            made.put(name, full(own[name]).detach(), trained=name in trained)
        return made

    def get(self, key: str) -> Tensor:
        """The tensor kept under a dotted name."""
        value = getattr(*owner_of(self, key))
        assert isinstance(value, Tensor)
        return value

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its dotted name."""
        yield from self.named_parameters()
        yield from self.named_buffers()


def _refuse_rows(override: Override, count: int) -> None:
    """Rows must be there, and each be named once."""
    wrong = [row for row in override.rows if not 0 <= row < count or override.rows.count(row) > 1]
    if wrong:
        what = f"these tokens are outside the embedding's {count} rows, or are named twice: {wrong[:5]}"
        hint = "resize the base's embedding before you adapt it (resize_token_embeddings), and name each token once"
        raise PeftfxError(what, override.name, hint)


def _tensors_of(holder: nn.Module) -> dict[str, Tensor]:
    return {**dict(holder.named_parameters(recurse=False)), **dict(holder.named_buffers(recurse=False))}


def shared_key(number: int, name: str) -> str:
    """Where an adapter keeps what the places of a rule share, by the rule's number."""
    return f"{SHARED}.{number}.{name}"
