"""Method: what a rule does at a site. A method is plain torch; it knows no model architecture and edits no graph.

There is a protocol for each kind of site: that of weights is in `weight.py` beside this file, that of attention in
`attention.py`, that of the token stream in `sequence.py`; what trains copies of the base's own tensors is in
`override.py`.
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
from peftfx.sites.site import Site

PLACING = (
    *("target", "target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
)
"""The options that say where a method applies."""
Params = Mapping[str, Tensor]


class Base(NamedTuple):
    """The frozen tensors of a site, however they are stored.

    `weight` is [out, in, *kernel]; [num, dim] for an embedding, [experts, out, in] for experts.
    """

    weight: Tensor
    bias: Tensor | None


class Op(Protocol):
    """A site's own operation, with stride, padding, dilation, padding index and the like bound.

    A conv's groups follow from its weight: a [out, in, *kernel] weight at a site of several groups is a dense conv.
    At experts each row of `x` meets the weight of its own: any [experts, out, in] weight will do.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method's options and where it applies; together, a rule.

    Args:
        target: an expression over roles, module-path suffixes, `/regular expressions/` and `all-linear`, combined by
            `|`, `&`, `~` and parentheses: `"attention.query | attention.value"`. See `peftfx.sites.target`.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: as in HF PEFT.
        modules_to_save: modules trained and saved whole beside the adapter, a fresh head say; as in HF PEFT, each name
            is the end of a path, and need not begin at a dot.
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
    """Fields of HF PEFT's config that change nothing for this method, whatever their value."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields of HF PEFT's config that are refused, each with why, and, behind a semicolon, what to do instead."""
    wraps_attention: ClassVar[bool] = False
    """Whether HF PEFT adapts a `torch.nn.MultiheadAttention` by this method, its two projections at once."""
    counted: ClassVar[bool] = False
    """Whether what a place has depends on how many there are, and on its number: all that are targeted must run."""
    layered: ClassVar[bool] = True
    """Whether HF PEFT's config has `layers_to_transform`; else the modules that it leaves are named."""
    targeted: ClassVar[bool] = True
    """Whether the options say at which sites it acts; else there is one place for it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Hashed as `Method` is: what a dataclass makes of its fields cannot hash a dict."""
        super().__init_subclass__(**options)
        if "__hash__" not in vars(cls):
            cls.__hash__ = Method.__hash__  # type: ignore[method-assign]

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """A method that is half done is refused, by what it lacks."""
        refuse_incomplete(cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Options are checked; sequences become tuples, so that a method can be hashed and compared.

        Raises:
            PeftfxError: a value is not of its field's type, or none of the texts that the type lists; or a field whose
                name ends in `dropout` is no probability below 1.
        """
        refuse_misfit_fields(self)
        refuse_unknown_choices(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (list, set)):
                object.__setattr__(self, field.name, tuple(sorted(value) if isinstance(value, set) else value))
            if field.name.endswith("dropout") and not 0 <= value < 1:
                hint = f"{type(self).__name__}({field.name}=0.05)"
                raise PeftfxError(f"it must be a probability below 1, not {value}", field.name, hint)

    def __hash__(self) -> int:
        return hash(repr(self))

    def at(self, site: Site) -> Self:
        """This method as configured for one site: options that depend on its path are resolved here, and here alone."""
        return self

    def acts_at(self, site: Site) -> bool:
        """Whether it can act at a site: by default at all of its kinds."""
        return site.kind in self.kinds

    def gather(self, methods: Mapping[str, Method]) -> Self:
        """The rule that gives each module path the method that it has: the inverse of `at`."""
        return self

    def naming(self, paths: Sequence[str], modules: Sequence[str]) -> Self:
        """This rule by HF PEFT's options: with those that pick these module paths, of all the base's, and no others.

        `target_modules` that were given stay; else it gets the shortest that will do, last components or whole paths.
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
        """Which of the base's biases are trained with it: `none`, `all`, or those of its sites, `lora_only` say."""
        return "none"

    @property
    def target_parameters(self) -> Collection[str] | None:
        """Parameters that are targeted by their own names, as experts' weights are."""
        return None

    @property
    def trainable_token_indices(self) -> Sequence[int] | Mapping[str, Sequence[int]] | None:
        """Rows of embeddings that are trained beside it."""
        return None

    def rows(self) -> tuple[int, ...]:
        """The rows of each tensor that it trains, where it trains some of them alone."""
        return ()

    @property
    def dropout(self) -> float:
        """The rate of a dropout that the method has itself, and that is no module of the model."""
        return 0.0

    @property
    def attention_rank(self) -> int | None:
        """The rank that HF PEFT's files have for both projections of one of torch's attentions; None: no file can.

        Of methods that are `wraps_attention`.
        """
        return None

    def needs_place(self, module: nn.Module) -> bool:
        """Whether a module must be a site where `target_modules` name it: else the rule is refused."""
        return False

    @property
    def neutral(self) -> bool:
        """Whether a new adapter changes no output."""
        return True

    @property
    def obstacle(self) -> PeftfxError | None:
        """Why no new adapter can start with these options here; files that have them are read."""
        return None

    @property
    def doubt(self) -> str:
        """Why a file of this method may not give what was trained, a warning on loading; empty where it does."""
        return ""

    @property
    def unfoldable(self) -> str:
        """Why no weight does what `forward` does, and `fold` is refused; empty where one does.

        What it does stays beside the weight then: it is never merged, and an export has its operations.
        """
        return ""

    @property
    def inputs(self) -> Mapping[str, int]:
        """Arguments of a call beside the model's own, as HF PEFT's `task_ids`: of each, how many values there are.

        They are whole numbers from 0, one for each row of the batch, [batch]. What a method computes a call by finds
        them in `p`, where there is more than one value. Such a method has no graph until it is `settled`.
        """
        return {}

    @property
    def invoked_by(self) -> tuple[int, ...]:
        """Tokens of an invocation: it acts from the last of them in a row's text on, and not before; none, everywhere.

        Where that is, `forward` finds in `p` by the name `active`: bool[batch, length, 1].
        """
        return ()

    def settled(self, values: Mapping[str, int]) -> Self:
        """This method for one value of each of its inputs."""
        return self

    def settle(self, p: Params, values: Mapping[str, int]) -> dict[str, Tensor]:
        """The parameters of the `settled` method."""
        return dict(p)

    def frozen(self) -> frozenset[str]:
        """Names of those of `init` and of `shared` that are constants: kept beside the adapter, and not trained.

        Whole numbers are, named or not.
        """
        return frozenset()

    def is_constant(self, name: str, value: Tensor) -> bool:
        """Whether one of its tensors is not trained."""
        return not value.is_floating_point() or name in self.frozen()

    def remembered(self) -> frozenset[str]:
        """Names of tensors that training keeps beside the parameters, once there are any; no graph reads them."""
        return frozenset()

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        """What all places of a rule read, whose sites these are: kept once, in each `p`, trained if not `frozen`.

        The sites are in the order of the base's modules, which is HF PEFT's. `bases` are their tensors, made one by one
        as they are asked for; none where the sites have no weights.
        `like` is one of the base's weights: it has the device and the dtype.
        """
        return {}

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str] | None:
        """Which of what is shared one of these sites reads: by its name in `p`, the name that `shared` gave it.

        By default all of it, by its own names.
        """
        return None

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        """For each of these that is saved, its key in a HF PEFT checkpoint, prefix included.

        What is trained must be. What is not is made again when an adapter is loaded.
        """
        return {}

    def adjust(self, places: Sequence[Kept], step: int) -> None:  # noqa: B027
        """Change the parameters of the rule's places between two steps of a training, while there are gradients."""

    def penalty(self, p: Params) -> Tensor | None:
        """A term for the model's loss; the loss gets the mean over the rule's places that have one."""
        return None

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of this method's fields."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> Method:
        """Build from keyword options; an unknown one is an error that names the nearest."""
        for name in options:
            if name not in cls.options():
                raise PeftfxError(f"{cls.__name__} has no option {name!r}", name, nearest(name, cls.options()))
        return cls(**options)  # type: ignore[arg-type]


def has_parameter(module: nn.Module, axes: int) -> bool:
    """Whether a module has a parameter of its own, of so many axes at least, or a weight computed from some."""
    own = module._parameters.values()
    return hasattr(module, "parametrizations") or any(p is not None and p.ndim >= axes for p in own)
