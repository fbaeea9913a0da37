"""Placement: where a rule acts, and on what: a method at a site, and the base's tensors that it trains copies of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftfx.contract.attention import ATTENTION, AttentionMethod, key_weight
from peftfx.contract.completeness import asking, refuse_keys, refuse_parameters
from peftfx.contract.method import Base, Method, Params, WeightMethod
from peftfx.contract.override import OverrideMethod
from peftfx.contract.sequence import SEQUENCE, SequenceMethod, embedding_path
from peftfx.sharding import full, is_part
from peftfx.sites.blocks import Block, part_site, turned
from peftfx.sites.site import Part, Site

SAVED = "saved"  #: the folder of an adapter in which it keeps copies of the base's own tensors
TOKENS = "trainable_tokens_delta"  #: HF PEFT's name for the rows of an embedding that an adapter trains
SHARED = "shared_by_rule"  #: the folder in which each rule, by its number, keeps what its places share


@dataclass(frozen=True)
class Override:
    """A tensor of the base that an adapter replaces by one of its own, or rows of it, within one module.

    Attributes:
        key: where the adapter keeps its tensor, a dotted name.
        module: the module path within which uses of the base's tensor are replaced.
        name: the tensor's name, relative to the module.
        rows: which of its rows the adapter's tensor is; empty for the whole.
        trained: whether the adapter trains it; one that a file brought is as it is.
    """

    key: str
    module: str
    name: str
    rows: tuple[int, ...] = ()
    trained: bool = True

    @property
    def stands(self) -> bool:
        """Whether it is counted as the base's own, as HF PEFT counts a trained bias; copies and rows come on top."""
        return self.trained and not self.module and not self.rows

    @property
    def indices(self) -> str:
        """Where the adapter keeps the rows' indices."""
        return f"{self.key.rpartition('.')[0]}.token_indices"


@dataclass(frozen=True)
class Placement:
    """A method at a site, or at one part of a fused site.

    Attributes:
        copies: the base's tensors that the method trains copies of here.
    """

    method: WeightMethod | AttentionMethod | SequenceMethod | OverrideMethod
    site: Site
    part: Part | None = None
    copies: tuple[Override, ...] = ()

    @property
    def key(self) -> str:
        """Where its parameters are in the adapter: the site's path, and the part's role in short."""
        if self.site.kind == SEQUENCE:
            return SEQUENCE
        if self.site.kind == ATTENTION:
            return self.site.path or ATTENTION  # a module without a path computes it itself
        if isinstance(self.method, OverrideMethod):
            return f"{SAVED}.{self.site.path}"
        return self.site.path if self.part is None else f"{self.site.path}.{self.part.role.rpartition('.')[2]}"

    @property
    def block(self) -> Block | None:
        """The rows of the part."""
        if self.part is None:
            return None
        return Block.of(self.part, self.site.rows)

    @property
    def view(self) -> Site:
        """The site as the method sees it."""
        return self.site if self.part is None else part_site(self.site, self.part, self.block)  # type: ignore[arg-type]

    def init(self, base: nn.Module, rng: torch.Generator | None, shared: Params | None = None) -> dict[str, Tensor]:
        """New parameters for this place in the base module; not the copies that it has.

        Raises:
            PeftfxError: the method's `init` or `keys` give something else than they must.
        """
        if isinstance(self.method, OverrideMethod):
            return {}
        with asking(self.method, "init", self.site.path):
            params = self._start(base, rng, shared or {})
        keys = None if isinstance(self.method, SequenceMethod) else self.suffixes()
        refuse_parameters(self.method, self.site.path, params, keys)
        return params

    def _start(self, base: nn.Module, rng: torch.Generator | None, shared: Params) -> dict[str, Tensor]:
        if isinstance(self.method, SequenceMethod):
            return self.method.init(self.site, base.get_submodule(embedding_path(self.site)), rng)
        if isinstance(self.method, AttentionMethod):
            return self.method.init(self.site, full(key_weight(base, self.site)), rng)
        assert isinstance(self.method, WeightMethod)
        own = self.base(*whole_tensors(base, self.site))
        params = self.method.init(self.view, own, rng)
        more = self.method.start(self.view, own, shared, rng)
        return {**params, **more} if more else params

    def suffixes(self) -> dict[str, str]:
        """For each parameter that is saved, its suffix in a HF PEFT checkpoint."""
        if isinstance(self.method, OverrideMethod):
            names = (override.key.rpartition(".")[2] for override in self.copies)
            return {name: self.method.suffix(name) for name in names}
        assert isinstance(self.method, WeightMethod | AttentionMethod)
        with asking(self.method, "keys", self.site.path):
            return self.method.keys(self.site)

    def base(self, weight: Tensor, bias: Tensor | None) -> Base:
        """The site's tensors as the method sees them: [out, in] or [experts, out, in], and the part's rows alone."""
        weight = turned(weight, self.site.transposed)
        if self.block is None:
            return Base(weight, bias)
        return Base(self.block.take(weight, self.site.rows_axis), None if bias is None else self.block.take(bias, 0))


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


def shared_by(rule: Placed, base: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
    """What the places of a rule share, new.

    Raises:
        PeftfxError: the method's `shared` gives no tensors by name, or `shared_keys` leaves out what is trained.
    """
    if not rule.placements:
        return {}
    method, sites = rule.method, [p.view for p in rule.placements]
    first = next((p.detach() for p in base.parameters() if p.is_floating_point()), torch.empty(0))
    like = torch.empty(0, dtype=first.dtype, device=first.device) if is_part(first) else first
    bases = (p.base(*whole_tensors(base, p.site)) for p in rule.placements if isinstance(p.method, WeightMethod))
    with asking(method, "shared", ""):
        made = method.shared(sites, bases, like, rng)
        keys = method.shared_keys()
    refuse_parameters(method, "", made, member="shared")
    refuse_keys(method, "shared_keys", "", keys, made.keys())
    return made


def whole_tensors(base: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """The same as `site_tensors`, gathered where each process has a part of them."""
    weight, bias = site_tensors(base, site)
    return full(weight), None if bias is None else full(bias)


def site_tensors(base: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """The weight, as it is stored, and the bias of a site in the base module."""
    weight = getattr(*owner_of(base, site.weight.partition(".")[2]))
    bias = None if site.bias is None else getattr(*owner_of(base, site.bias.partition(".")[2]))
    return weight, bias


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a tensor of this dotted name, and the name's last part."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def copies_of(base: nn.Module, method: OverrideMethod, site: Site) -> tuple[Override, ...]:
    """The tensors that a method trains copies of at a site: of its module, or the bare parameter that it is.

    Rows are those of the tensor wherever the base uses it, in a tied head too, if the model says that it ties.
    """
    try:
        module, own = site.path, base.get_submodule(site.path).state_dict(keep_vars=True)
        names = {name: name for name in own if "." not in name}
    except AttributeError:
        module, _, name = site.weight.partition(".")[2].rpartition(".")
        names = {"weight": name}
    copied = method.copied(site, list(names))
    if rows := method.rows():
        if not ties_embeddings(base):
            return tuple(rows_of(site.path, rows, names[n], module) for n in copied)
        return tuple(rows_of(site.path, rows, f"{module}.{names[n]}".removeprefix(".")) for n in copied)
    return tuple(Override(f"{SAVED}.{site.path}.{n}", module, names[n]) for n in copied)


def ties_embeddings(base: nn.Module) -> bool:
    """Whether a model says, as transformers' do, that its embeddings are tied: what HF PEFT goes by.

    Where a module is tied by hand alone, HF PEFT trains the rows of the one that is named, and the others keep theirs.
    """
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    return bool(tied) and getattr(base, "_tied_weights_keys", None) is not None


def rows_of(path: str, rows: tuple[int, ...], name: str, module: str = "") -> Override:
    """Rows of the tensor of this name, as the adapter of a module's own: of the one at `path`."""
    return Override(f"{SAVED}.{path}.{TOKENS}", module, name, rows)
