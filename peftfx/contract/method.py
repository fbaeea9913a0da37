"""Method: the base class of all methods. A method is plain torch: it knows no architecture and edits no graph.

Each kind of site has a base class of its own, in a file beside this one: `weight.py` for weights, `attention.py` for
attentions, `sequence.py` for the token stream, `pattern.py` for matches of patterns. `override.py` has the methods that
train copies of the base's own tensors.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from peftfx.contract.completeness import refuse_incomplete
from peftfx.contract.kept import Kept
from peftfx.errors import PeftfxError, nearest
from peftfx.field_types import refuse_misfit_fields, refuse_unknown_choices
from peftfx.options import LINEAR
from peftfx.sites.site import Site

PLACING = (
    *("target", "target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
)
"""The options that say where a method applies."""
Params = Mapping[str, Tensor]


class Base(NamedTuple):
    """The frozen weight and bias of a site, in one layout for all ways of storing them.

    `weight` is [out, in, *kernel]; [num, dim] for an embedding; [experts, out, in] for experts.
    """

    weight: Tensor
    bias: Tensor | None


class Op(Protocol):
    """A site's own operation, with stride, padding, dilation, padding index and similar constants given.

    A conv's groups follow from the weight's shape: a weight [out, in, *kernel] at a site of several groups makes a
    dense conv. At experts each row of `x` is multiplied by its own expert's weight, and any weight [experts, out, in]
    works.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


#: Options that are rates of dropouts which HF PEFT does not have as a `torch.nn.Dropout`.
_NO_MODULES = ("rank_dropout", "module_dropout", "boft_dropout", "encoder_dropout")


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method's options and the target where it applies; together, a rule.

    Args:
        target: an expression over roles, module-path suffixes, `/regular expressions/` and `all-linear`, combined by
            `|`, `&`, `~` and parentheses: `"attention.query | attention.value"`. See `peftfx.sites.target`.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: as in HF PEFT.
        modules_to_save: modules that are trained and saved whole with the adapter, such as a fresh head. As in HF PEFT,
            each name is the end of a path, and need not start at a dot.
    """

    target: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] | None = None
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    peft_type: ClassVar[str]
    default_target: ClassVar[str]
    kinds: ClassVar[frozenset[str]]
    prefix: ClassVar[str] = "base_model.model."
    """What HF PEFT puts before a module's path in the keys of this method's files."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields of HF PEFT's config that change nothing in HF PEFT for this method, whatever their value: never read."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields of HF PEFT's config that are refused, each with the reason and, after a semicolon, what to do instead."""
    by_size: ClassVar[frozenset[str]] = frozenset()
    """Suffixes of a place's tensors in a checkpoint that depend on the sizes of the place's weight."""
    wraps_attention: ClassVar[bool] = False
    """Whether HF PEFT adapts a `torch.nn.MultiheadAttention` by this method, its two projections at once."""
    schedule: ClassVar[frozenset[str]] = frozenset()
    """Options that `adjust` alone reads: they may change while an adapter is trained."""
    sums_by: ClassVar[str] = LINEAR
    """The type of a weighted sum of adapters, if none is asked for; as in HF PEFT."""
    layered: ClassVar[bool] = True
    """Whether HF PEFT's config has `layers_to_transform`. Otherwise files name the modules that this option leaves."""
    targeted: ClassVar[bool] = True
    """Whether the options say at which sites the method acts. Otherwise there is only one place for it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Give the subclass the hash of `Method`: a dataclass's own hash fails for options that are dicts."""
        super().__init_subclass__(**options)
        if "__hash__" not in vars(cls):
            cls.__hash__ = Method.__hash__  # type: ignore[method-assign]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse a method's class that lacks a member of the contract."""
        refuse_incomplete(cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the types of the options, and make sequences tuples, to hash and compare methods.

        Raises:
            PeftfxError: a value is not of its field's type, or none of the texts that the type lists; or a field whose
                name ends in `dropout` is no probability.
        """
        refuse_misfit_fields(self)
        refuse_unknown_choices(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (list, set)):
                object.__setattr__(self, field.name, tuple(sorted(value) if isinstance(value, set) else value))
            if field.name.endswith("dropout") and not 0 <= value <= 1:
                hint = f"{type(self).__name__}({field.name}=0.05)"
                raise PeftfxError(f"{field.name} must be a probability, from 0 to 1, not {value}", field.name, hint)

    def __hash__(self) -> int:
        return hash(repr(self))

    def at(self, site: Site) -> Self:
        """Return this method as configured for one site. Options that depend on the path are resolved only here."""
        return self

    def acts_at(self, site: Site) -> bool:
        """Return whether the method can act at a site: by default at all sites of its kinds."""
        return site.kind in self.kinds

    def gather(self, methods: Mapping[str, Method]) -> Self:
        """Return the rule that gives each module path its method of `methods`: the inverse of `at`."""
        return self

    def naming(self, paths: Sequence[str], modules: Sequence[str]) -> Self:
        """Return this rule with HF PEFT's options that pick the module `paths`, of all the base's `modules`.

        Given `target_modules` are kept. Otherwise they become the shortest names that work: last components, or whole
        paths.
        """
        if self.target is None and self.target_modules and (self.layered or self.layers_to_transform is None):
            return self
        chosen, ends = set(paths), {p.rpartition(".")[2] for p in paths}
        others = {n.rpartition(".")[2] for n in modules if n not in chosen}
        names = tuple(sorted(ends if not ends & others else chosen))
        filters: dict[str, Any] = dict.fromkeys(("target", "exclude_modules", "layers_to_transform", "layers_pattern"))
        return dataclasses.replace(self, target_modules=names, **filters)

    @property
    def bias(self) -> str:
        """Which biases of the base are trained too: `none`, `all`, or those of the rule's sites, as by `lora_only`."""
        return "none"

    @property
    def target_parameters(self) -> Collection[str] | None:
        """The parameters that are targeted by their own names, such as experts' weights."""
        return None

    @property
    def trainable_token_indices(self) -> Sequence[int] | Mapping[str, Sequence[int]] | None:
        """The rows of embeddings that are trained beside the adapter's parameters."""
        return None

    def rows(self) -> tuple[int, ...]:
        """Return the rows of each tensor that the method trains, if it trains only some rows."""
        return ()

    @property
    def dropout_option(self) -> str:
        """The option that is the rate of a `torch.nn.Dropout` in HF PEFT; empty if there is none."""
        names = (field.name for field in dataclasses.fields(self) if field.name.endswith("_dropout"))
        return next((name for name in names if name not in _NO_MODULES), "")

    @property
    def attention_rank(self) -> int | None:
        """The rank of both projections of a torch attention in HF PEFT's files; None if files cannot hold it.

        It is read only of methods with `wraps_attention`.
        """
        return None

    def needs_place(self, module: nn.Module) -> bool:
        """Return whether a `module` named in `target_modules` must be a site; if it is not, the rule is refused."""
        return False

    @property
    def neutral(self) -> bool:
        """Whether a new adapter changes no output."""
        return True

    @property
    def obstacle(self) -> PeftfxError | None:
        """The error that says why no new adapter can start with these options here. Files with them are read."""
        return None

    @property
    def at_layers_alone(self) -> bool:
        """Whether options of this rule need a layer in HF PEFT, so that `target_parameters` cannot name its sites."""
        return False

    @property
    def counted(self) -> bool:
        """Whether a place's parameters depend on the number of places and on the place's index: all places must run."""
        return False

    @property
    def doubt(self) -> str:
        """Why a file of this method may not give what was trained: a warning on loading. Empty if it gives it."""
        return ""

    @property
    def unloadable(self) -> str:
        """Why HF PEFT cannot load the files of this rule: a warning when they are written. Empty if it can."""
        return ""

    @property
    def unfoldable(self) -> str:
        """Why no weight does what `forward` does, so that `fold` is refused. Empty if a weight does.

        Such a method stays beside the weight: it is never merged, and an export has its operations.
        """
        return ""

    @property
    def inputs(self) -> Mapping[str, int]:
        """The arguments of a call beside the model's own, such as HF PEFT's `task_ids`, each with its value count.

        Each argument is [batch], a whole number from 0 for each row of the batch. Where an argument has more than one
        value, the method's functions find it in `p`. Such a method has no graph until it is `settled`.
        """
        return {}

    @property
    def invoked_by(self) -> tuple[int, ...]:
        """The tokens of an invocation: in each row, the method acts from the last of them on. Empty: everywhere.

        `forward` finds the positions where the method acts in `p["active"]`: bool[batch, length, 1].
        """
        return ()

    def settled(self, values: Mapping[str, int]) -> Self:
        """Return this method for one value of each of its inputs."""
        return self

    def settle(self, p: Params, values: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the parameters of the `settled` method."""
        return dict(p)

    def frozen(self) -> frozenset[str]:
        """Return the names of tensors of `init` and `shared` that are constants: kept in the adapter, not trained.

        Tensors of whole numbers are constants, named or not.
        """
        return frozenset()

    def is_constant(self, name: str, value: Tensor) -> bool:
        """Return whether the tensor `name` is a constant, so that it is not trained."""
        return not value.is_floating_point() or name in self.frozen()

    def remembered(self) -> frozenset[str]:
        """Return the names of tensors that training may keep beside the parameters. No graph reads them."""
        return frozenset()

    def excluding(self) -> frozenset[str]:
        """Return the names of tensors in which minus infinity is a value: the logit of what is never chosen."""
        return frozenset()

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return the tensors that all places of a rule read: kept once, in each place's `p`, trained if not `frozen`.

        `sites` are those of the places, in the order of the base's modules, as in HF PEFT. `bases` are their tensors,
        made one by one as they are read; none where the sites have no weights. `like` is one of the base's weights, for
        its device and dtype.
        """
        return {}

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str] | None:
        """Return which shared tensors the place at `site` reads: by its name in `p`, the name that `shared` gave.

        By default (None) the place reads all of them, by the same names.
        """
        return None

    @property
    def has_shared(self) -> bool:
        """Whether the places of a rule share tensors."""
        return type(self).shared is not Method.shared

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        """Return the key in a HF PEFT checkpoint of each shared tensor that is saved, prefix included.

        A trained tensor must be saved. Other tensors are made again when an adapter is loaded.
        """
        return {}

    def sized_by_layers(self) -> Mapping[str, tuple[int, ...]]:
        """Return, by the shared tensors' names, the dimensions that are as long as the largest targeted layer asks for.

        In a file they may be longer: HF PEFT's targets count whether or not a call runs them. Others must be equal.
        """
        return {}

    def as_saved(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Self, str]:
        """Return the method that a file is of, and why it is not this one, which its config says; empty if it is.

        Args:
            shapes: the shapes of the file's tensors, by their names there without `prefix`.
        """
        return self, ""

    def changes_nothing(self, saved: Mapping[str, Tensor]) -> bool:
        """Return whether the tensors that a file has of one module leave this module's output as it is.

        Such tensors are left out if they belong to a module that the call does not run. False, the default, if that is
        not known: then they are folded into the module's weight, where no tensors are shared, and the two compared.

        Args:
            saved: the tensors by their suffixes in the file, such as `lora_B.weight`.
        """
        return False

    def copy_mark(self) -> str:
        """Return what is ahead of a tensor's name in a file where the tensor is a copy of the module's own; else ""."""
        return ""

    def adjust(self, places: Sequence[Kept], step: int) -> None:  # noqa: B027
        """Change the parameters of the rule's places between two training steps, while there are gradients."""

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` does something."""
        return type(self).adjust is not Method.adjust

    def penalty(self, p: Params) -> Tensor | None:
        """Return a term for the model's loss. The loss gets the mean over the rule's places that have a term."""
        return None

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the names of this method's options."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> Method:
        """Build the method from keyword options. An error for an unknown option names the nearest known option."""
        for name in options:
            if name not in cls.options():
                raise PeftfxError(f"{cls.__name__} has no option {name!r}", name, nearest(name, cls.options()))
        return cls(**options)  # type: ignore[arg-type]


def has_parameter(module: nn.Module, axes: int) -> bool:
    """Return whether a module has a parameter of at least `axes` axes, or a weight computed from parameters."""
    own = module._parameters.values()
    return hasattr(module, "parametrizations") or any(p is not None and p.ndim >= axes for p in own)


def settings_of(method: Method) -> tuple[object, ...]:
    """Return a method's class and options, without those that say where it applies: these can list each site."""
    own = (f.name for f in dataclasses.fields(method) if f.repr and f.name not in PLACING)
    return type(method).__qualname__, *((name, getattr(method, name)) for name in own)
