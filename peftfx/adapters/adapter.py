"""The class `Adapter`: the trained tensors of one adapter, each under its site's path and its parameter's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import Method
from peftfx.contract.override import Override
from peftfx.contract.placed import DROPOUTS, SHARED, Placed, Placements, shared_by
from peftfx.contract.placement import Placement, owner_of
from peftfx.errors import PeftfxError, how_many
from peftfx.sharding.parts import full, is_part, whole_with_gradient


@dataclass(frozen=True)
class Account:
    """The use of each tensor of the file that a rule was loaded from; tensors go by their names in the file.

    Attributes:
        taken: for each tensor that the adapter took, the dotted name under which the adapter keeps the tensor.
        repeats: the tensors that only repeat a tensor of the base or another tensor of the file.
        unused: the tensors of modules that never run, or that are `unread`. They change nothing, and are saved again
            unchanged.
        unread: the paths of modules that ran in the call with which the file was loaded, but whose results did not
            reach an output of the call.
    """

    taken: Mapping[str, str]
    repeats: tuple[str, ...]
    unused: Mapping[str, Tensor]
    unread: frozenset[str] = frozenset()


UNKNOWN = "unknown"  #: a start that no config can name


class Holder(nn.Module):
    """A module in the tree of modules that holds an adapter's tensors.

    Attributes:
        hosted: whether this module is also a child of a module of the base. `fully_shard`, which walks over `children`
            and must meet each parameter once, then finds this module only there. `Trainer`, which walks over
            `named_children` for the parameters' names, finds it here too.
    """

    hosted = False

    def children(self) -> Iterator[nn.Module]:
        """Yield the child modules that are not also children of a module of the base."""
        return (m for m in super().children() if not (isinstance(m, Holder) and m.hosted))


class Adapter(Holder):
    """The trained tensors of one adapter, in modules that mirror the module paths of the base.

    Attributes:
        placed: the rules that the adapter was made from, each with its placements.
        records: what a loaded config says about the base and the task; saved again with the adapter.
        accounts: the `Account` of each rule that was loaded from a file, by the rule's number.
        named: the module paths that the keys of a loaded file name, whether or not a rule acts there, without those
            that the file's config leaves out.
        ran: for a new adapter, the modules that ran in the call from which the rules were placed.
        start: the start by which HF PEFT moved the weights of the base in memory, such as `pissa`: to be saved with the
            adapter, so that it fits the base's files. `UNKNOWN` if the adapter was made from several.
        moved_with_base: whether the base's modules are being moved or cast, too, and what is in them with them.
    """

    moved_with_base = False

    def __init__(self, placed: Sequence[Placed], config: Mapping[str, object] | None = None) -> None:
        super().__init__()
        kept = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
        self.records = {k: v for k, v in (config or {}).items() if k in kept}
        self.named: frozenset[str] = frozenset()
        self.ran: frozenset[str] = frozenset()
        self.start = ""
        self.placed: tuple[Placed, ...] = ()
        self.accounts: dict[int, Account] = {}
        self._rule: dict[str, int] = {}
        self._rates: dict[int, float] = {}
        self._take(placed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the tensors: alone, also those of modules that are children of the base's modules, too."""
        super()._apply(fn, recurse)
        for module in self.modules() if recurse and not self.moved_with_base else ():
            if isinstance(module, Holder) and module.hosted:
                module._apply(fn)
        return self

    def _take(self, placed: Sequence[Placed]) -> None:
        for number, rule in enumerate(placed, len(self.placed)):
            self._rule |= {placement.key: number for placement in rule.placements}
            if rate := getattr(rule.method, rule.method.dropout_option, 0.0):
                self._holder(DROPOUTS).add_module(str(number), nn.Dropout(rate))
                self._rates[number] = rate
        self.placed += tuple(placed)

    def settle_dropout(self) -> bool:
        """Take the rates over that other code has set in the rules' dropout modules; return whether any is new.

        TRL and others find each `torch.nn.Dropout` of a model, and switch it off.
        """
        before = self.placed
        for number, module in self._modules[DROPOUTS]._modules.items() if DROPOUTS in self._modules else ():  # type: ignore[union-attr]
            assert isinstance(module, nn.Dropout)
            at, rule = int(number), self.placed[int(number)]
            rate = module.p if module.training or not self.training else 0.0
            if rate != getattr(rule.method, rule.method.dropout_option):
                self.placed = (*self.placed[:at], rule.dropping(rate), *self.placed[at + 1 :])
        return self.placed is not before

    def reschedule(self, name: str, value: object) -> None:
        """Set an option of the schedule by which the adapter's only rule changes its parameters; see `Method.schedule`.

        Raises:
            PeftfxError: the option has no such value, or not with the other options.
        """
        (rule,) = self.placed
        self.placed = (rule.changed(name, value),)

    @property
    def asked(self) -> tuple[Placed, ...]:
        """The rules with the rates of dropout that were asked for, as files have them, and as HF PEFT keeps them."""
        rates = self._rates
        return tuple(rule.dropping(rates[i]) if i in rates else rule for i, rule in enumerate(self.placed))

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(type(rule).__name__ for rule in self.rules)) or "no rules"
        count = sum(p.numel() for p in self.parameters())
        return f"Adapter({kinds}: {how_many(len(self.placements), 'place')}, {how_many(count, 'parameter')})"

    @property
    def rules(self) -> tuple[Method, ...]:
        """The methods of the adapter's rules, in the rules' order."""
        return tuple(rule.method for rule in self.placed)

    @property
    def placements(self) -> Placements:
        """The placements of all of the adapter's rules."""
        return Placements(p for rule in self.placed for p in rule.placements)

    @property
    def overrides(self) -> tuple[Override, ...]:
        """The base's tensors that the adapter has copies of, each once; rows come after whole copies."""
        placed = [o for rule in self.placed for o in rule.overrides]
        found = {o.key: o for o in (*placed, *(o for p in self.placements for o in p.copies))}
        return tuple(sorted(found.values(), key=lambda override: bool(override.rows)))

    def create(self, base: nn.Module, rng: torch.Generator | None) -> None:
        """Make every parameter with its method's initial values; overrides start as copies of the base's tensors."""
        self.share(base, rng)
        for rule in self.placed:
            for placement in rule.placements:
                with torch.no_grad():
                    params = placement.init(base, rng, {n: self.get(key) for n, key in self._reads(placement).items()})
                self._holder(placement.key)  # a placement may have no tensors beside those that its rule shares
                for name, value in params.items():
                    trained = not placement.method.is_constant(name, value)
                    self.put(f"{placement.key}.{name}", value, trained=trained)
        self.copy_overridden(base)

    @torch.no_grad()
    def share(self, base: nn.Module, rng: torch.Generator | None = None) -> None:
        """Make the tensors that all placements of a rule share, for each rule; see `shared_by`."""
        for number, rule in enumerate(self.placed):
            for name, value in shared_by(rule, base, rng).items():
                self.put(shared_key(number, name), value, trained=not rule.method.is_constant(name, value))

    def copy_overridden(self, base: nn.Module) -> None:
        """Make the overrides, as copies of the base's tensors. As in HF PEFT, only rows are in the adapters' dtype."""
        for override in self.overrides:
            owner, leaf = owner_of(base.get_submodule(override.module), override.name)
            tensor = full(getattr(owner, leaf)).detach()
            if override.rows:
                _refuse_rows(override, len(tensor))
                indices = torch.tensor(override.rows, device=tensor.device)
                self.put(override.indices, indices, trained=False)
                tensor = tensor[indices].to(adapter_dtype(tensor.dtype))
            self.put(override.key, tensor.clone(), trained=override.trained and leaf in owner._parameters)

    def params(self, placement: Placement) -> dict[str, Tensor]:
        """Return a placement's parameters and constants by name, with the tensors that its rule's placements share."""
        return {name: self.get(key) for name, key in self.keys(placement).items()}

    def keys(self, placement: Placement) -> dict[str, str]:
        """Return the dotted name of each tensor of `params(placement)`, by the parameter's name."""
        remembered = placement.method.remembered()
        own = {name: f"{placement.key}.{name}" for name in self.all_of(placement) if name not in remembered}
        return own | self._reads(placement)

    def _reads(self, placement: Placement) -> dict[str, str]:
        """Return the dotted names of the shared tensors that a placement reads, by the parameters' names."""
        number = self._rule[placement.key]
        chosen = self.placed[number].reads(placement, self.shared(number))
        return {name: shared_key(number, kept) for name, kept in chosen.items()}

    def shared(self, number: int) -> dict[str, Tensor]:
        """Return the tensors that the placements of rule `number` share, by name."""
        folder = self._modules.get(SHARED)
        rule = None if folder is None else folder._modules.get(str(number))
        return {} if rule is None else _tensors_of(rule)

    def all_of(self, placement: Placement) -> dict[str, Tensor]:
        """Return the parameters of one placement, and the buffers that its method keeps during training, by name."""
        return _tensors_of(self.get_submodule(placement.key))

    def penalty(self) -> Tensor | None:
        """Return the term that the rules add to the model's loss: for each rule the mean over its placements."""
        total = None
        for rule in self.placed:
            if type(rule.method).penalty is Method.penalty:
                continue
            wholes = ({n: whole_with_gradient(t) for n, t in self.params(p).items()} for p in rule.placements)
            terms = [p.method.penalty(whole) for p, whole in zip(rule.placements, wholes, strict=True)]
            found = [term for term in terms if term is not None]
            if found:
                mean = torch.stack(found).mean()
                total = mean if total is None else total + mean
        return total

    @property
    def excluding(self) -> frozenset[str]:
        """The dotted names of the tensors in which minus infinity is a value, as methods say."""
        return frozenset(f"{p.key}.{name}" for p in self.placements for name in p.method.excluding())

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Make buffers for what a method keeps during training, if `state` has a value; delete the other ones."""
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
        """Keep the tensor `value` under the dotted name `key`, as a parameter (`trained`) or as a buffer."""
        path, _, name = key.rpartition(".")
        value = value.contiguous()  # factors of a decomposition may not be, and safetensors writes no others
        holder = self._holder(path)
        if trained:
            holder.register_parameter(name, nn.Parameter(value))
        else:
            holder.register_buffer(name, value)

    def _holder(self, path: str) -> nn.Module:
        """Return the module at a dotted path; make the modules of the path that do not exist yet."""
        holder: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in holder._modules:
                holder.add_module(part, Holder())
            holder = holder.get_submodule(part)
        return holder

    def add(self, other: Adapter) -> None:
        """Append another adapter's rules, with their tensors, to this adapter's rules."""
        first = len(self.placed)
        self._take(other.placed)
        self.records = {**other.records, **self.records}
        self.named |= other.named
        self.start = other.start if not first or self.start == other.start else UNKNOWN
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

    @property
    def unread(self) -> frozenset[str]:
        """The paths of modules whose tensors were left out: the call it was loaded in used nothing of theirs."""
        return frozenset[str]().union(*(account.unread for account in self.accounts.values()))

    def gathered(self) -> Adapter:
        """Return the adapter with whole tensors: tensors that are sharded over processes are gathered one by one."""
        if not any(is_part(tensor) for _, tensor in self.tensors()):
            return self
        made = Adapter(())
        made.add(self)
        made.ran, trained = self.ran, {name for name, _ in made.named_parameters()}
        own = dict(self.tensors())  # read from the original: a copy of a sharded tensor does not know its whole
        for name in [name for name, _ in made.tensors()]:
            made.put(name, full(own[name]).detach(), trained=name in trained)
        return made

    def get(self, key: str) -> Tensor:
        """Return the tensor that is kept under the dotted name `key`."""
        value = getattr(*owner_of(self, key))
        assert isinstance(value, Tensor)
        return value

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter and buffer with its dotted name."""
        yield from self.named_parameters()
        yield from self.named_buffers()


def _refuse_rows(override: Override, count: int) -> None:
    """Refuse rows that the tensor does not have, and rows that are named twice."""
    wrong = [row for row in override.rows if not 0 <= row < count or override.rows.count(row) > 1]
    if wrong:
        what = f"these tokens are outside the embedding's {count} rows, or are named twice: {wrong[:5]}"
        hint = "resize the base's embedding before you adapt it (resize_token_embeddings), and name each token once"
        raise PeftfxError(what, override.name, hint)


def _tensors_of(holder: nn.Module) -> dict[str, Tensor]:
    return {**dict(holder.named_parameters(recurse=False)), **dict(holder.named_buffers(recurse=False))}


def shared_key(number: int, name: str) -> str:
    """Return the dotted name of a tensor `name` that the placements of rule `number` share."""
    return f"{SHARED}.{number}.{name}"
