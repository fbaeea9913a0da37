"""SequenceMethod: a method that puts virtual tokens, or keys and values of virtual tokens, before the text.

A sequence method computes what fills the hole of an entry (`peftfx/views/entry.py`). The compiler traces that once and
inserts it into the graph. The result depends on no input: merging makes it a constant, whatever encoder computed it.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import special_tokens
from peftfx.bases.embeddings import input_embeddings
from peftfx.bases.peft_models.text_table import text_table
from peftfx.bases.processors.token_types import plain_type, types_of_masks
from peftfx.bases.tasks import task_of
from peftfx.contract.method import PLACING, Method, Params
from peftfx.errors import PeftfxError, listed
from peftfx.graph.graph import BASE
from peftfx.graph.places import owns_weight
from peftfx.sites.site import SEQUENCE, Call, SequenceSite, Site
from peftfx.sites.sites import Sites
from peftfx.views.entry import Entry, VirtualTokens
from peftfx.views.prefix import Prefix, cache_shape

PROMPT = "prompt_embeddings"  #: HF PEFT's name of the saved tensor, and peftfx's of a prompt without an encoder


@dataclass(frozen=True, kw_only=True)
class SequenceMethod(Method):
    """A soft prompt. It has no target, for there is only one stream of tokens.

    Args:
        num_virtual_tokens: how many virtual tokens.
        token_dim, num_layers, num_attention_heads, num_transformer_submodules: sizes of the model, by HF PEFT's names;
            read from the model where they are not given.
    """

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    default_target: ClassVar[str] = SEQUENCE
    kinds: ClassVar[frozenset[str]] = frozenset({SEQUENCE})
    prefix: ClassVar[str] = "base_model."
    targeted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in PLACING if getattr(self, name, None) is not None]
        if given:
            what = f"{type(self).__name__} acts on the stream of tokens, and has no {given[0]}"
            raise PeftfxError(what, given[0], "leave it out")
        if self.num_virtual_tokens < 1:
            what = f"the number of virtual tokens must be 1 or more, not {self.num_virtual_tokens}"
            raise PeftfxError(what, "num_virtual_tokens", f"{type(self).__name__}(num_virtual_tokens=20)")

    @abstractmethod
    def sized(self, base: nn.Module, site: SequenceSite) -> Self:
        """Return this method with every missing size read from the model.

        Raises:
            PeftfxError: the model has no place for a soft prompt, or a given size is not the model's.
        """

    @abstractmethod
    def init(self, site: SequenceSite, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        """Return new parameters. `embed` is the module that embeds the text. Only a sized method has any."""

    @abstractmethod
    def saved(self, p: Params, training: bool = False) -> Tensor:
        """Return the tensor that HF PEFT saves: computed from the parameters, or the parameter `PROMPT` itself."""

    def split(self, saved: Tensor) -> dict[str, Tensor]:
        """Return the parameters of a saved prompt: `PROMPT` alone, or those that the prompt is made of."""
        return {PROMPT: saved}

    @property
    def splits(self) -> bool:
        """Whether the saved tensor determines the parameters, so that no other file needs to hold them."""
        return type(self).split is not SequenceMethod.split

    @abstractmethod
    def saved_shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor that HF PEFT saves."""

    def written(self, p: Params) -> dict[str, Tensor]:
        """Return the tensors of HF PEFT's file by name: the saved prompt, and further parameters if any."""
        return {PROMPT: self.saved(p)}

    def written_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the tensors of `written`."""
        return {PROMPT: self.saved_shape()}

    @abstractmethod
    def virtual(self, p: Params, training: bool) -> Tensor:
        """Return the tensor that fills the hole of the method's entry. Its first axis is rows if rows differ."""

    @abstractmethod
    def entry(self, base: nn.Module, site: SequenceSite) -> Entry:
        """Return the entry by which this method gets its virtual tokens into the base."""

    def apart_from_peft(self, base: nn.Module, site: SequenceSite) -> str:
        """Return why HF PEFT gives other outputs under this prompt, which is sized; empty if it gives the same."""
        return ""

    @property
    def submodules(self) -> int:
        """How often HF PEFT counts the virtual tokens: twice for an encoder with a decoder, else once."""
        return self.num_transformer_submodules or 1


class PromptMethod(SequenceMethod):
    """Virtual tokens before the text. For a decoder HF PEFT's table has as many rows again, which are never read."""

    def saved_shape(self) -> tuple[int, ...]:
        assert self.token_dim is not None
        return self.num_virtual_tokens * self.submodules, self.token_dim

    def virtual(self, p: Params, training: bool) -> Tensor:
        return self.saved(p, training)[: self.num_virtual_tokens]

    def entry(self, base: nn.Module, site: SequenceSite) -> Entry:
        return virtual_tokens(self.num_virtual_tokens, base, site)

    def apart_from_peft(self, base: nn.Module, site: SequenceSite) -> str:
        if site.beside:
            lost = f"{listed(site.beside, 1)} adds nothing to the text, or the call fails"
            return f"it gives the model embedded tokens and no ids, so {lost}"
        theirs = text_table(base)
        if theirs is None or base.get_submodule(theirs).weight is base.get_submodule(site.embedding).weight:
            return ""
        return f"it embeds the text by {theirs}, and the model by {site.embedding}"


_M = TypeVar("_M", bound=SequenceMethod)


def sequence_site(base: nn.Module, sites: Sites) -> SequenceSite:
    """Return the stream of tokens as a site: the argument that holds the ids, and the table that embeds them.

    Raises:
        PeftfxError: the model embeds no text.
    """
    found = [s for s in sites if s.role == "embedding.token" and s.calls and owns_weight(base, s.path)]
    if not found:
        alone = any(s.role == s.kind == "embedding" for s in sites)
        textless = "the model embeds no text: a soft prompt has no place"
        what = "the model's code cannot be captured: a soft prompt has no place" if alone else textless
        raise PeftfxError(what, type(base).__name__, "use a method that acts on weights, as LoRA")
    shared = getattr(input_embeddings(base), "weight", None)
    site = next((s for s in found if base.get_submodule(s.path).weight is shared), found[0])
    tokens = "input_ids" if hasattr(base, "main_input_name") else site.calls[0].x
    call = Call(tokens, "", "")
    weight = f"{BASE}.{site.path}.weight"
    beside = _tables_beside(sites, site)
    return SequenceSite("", SEQUENCE, SEQUENCE, None, weight, None, site.shape, False, (), (call,), beside=beside)


def _tables_beside(sites: Sites, site: Site) -> tuple[str, ...]:
    """Return the paths of other tables of tokens that read the inputs which `site` reads."""
    if sites.flow is None:
        return ()
    read: dict[int, set[int]] = {}
    for link in sites.flow.links:
        if link.source >= len(sites):
            read.setdefault(link.target, set()).add(link.source)
    own = read.get(sites.items.index(site), set())
    tables = [(i, s) for i, s in enumerate(sites) if s.role == site.role and s.weight != site.weight]
    return tuple(s.path for i, s in tables if own & read.get(i, set()))


def size_of(base: nn.Module, *names: str) -> int | None:
    """Return the first of the fields `names` that the config of the model's text has."""
    config = getattr(base, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    values = (getattr(text, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def with_text_sizes(method: _M, base: nn.Module, site: Site) -> _M:
    """Return a method of virtual tokens with the model's sizes. Some sizes are only for HF PEFT to read."""
    width = site.shape[1]
    if method.token_dim not in (None, width):
        what = f"the model's embeddings have {width} features, not {method.token_dim}"
        raise PeftfxError(what, "token_dim", "leave token_dim out")
    return dataclasses.replace(
        method,
        token_dim=width,
        num_layers=method.num_layers or size_of(base, "num_hidden_layers", "num_layers", "n_layers"),
        num_attention_heads=method.num_attention_heads or size_of(base, "num_attention_heads", "num_heads", "n_heads"),
        num_transformer_submodules=method.num_transformer_submodules or submodules_of(base),
    )


def virtual_tokens(count: int, base: nn.Module, site: SequenceSite) -> VirtualTokens:
    """Return the entry of `count` virtual tokens."""
    return VirtualTokens(
        (count, site.shape[1]),
        stream_dtype(base, site),
        site.embedding,
        tokens=site.tokens,
        filler=plain_token(base, site.shape[0]),
        dropped=untyped(base),
        labelled=not encodes_and_decodes(base),
    )


def prefix(count: int, base: nn.Module, site: SequenceSite) -> Prefix:
    """Return the entry of the keys and values of `count` virtual tokens, in each layer.

    Raises:
        PeftfxError: the model keeps no keys and values.
    """
    both = encodes_and_decodes(base)
    layers, heads, features = cache_shape(base, both)
    shape = count, layers * 2 * heads * features
    own = Prefix(shape, stream_dtype(base, site), heads, layers, both, untyped(base))
    return own if both else dataclasses.replace(own, types=types_of_masks(base), plain=plain_type(base))


_SEQ_TO_SEQ = "text2text-generation"
_WITHOUT_TYPES = ("text-generation", "feature-extraction", _SEQ_TO_SEQ)  #: HF PEFT takes no token types for these tasks


def untyped(base: nn.Module) -> frozenset[str]:
    """Return the arguments that HF PEFT does not pass on under a soft prompt, by the model's task."""
    return frozenset({"token_type_ids"} if task_of(base) in _WITHOUT_TYPES else ())


def stream_dtype(base: nn.Module, site: SequenceSite) -> torch.dtype:
    """Return the dtype of the embedded text."""
    weight = base.get_submodule(site.embedding).weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def submodules_of(base: nn.Module) -> int:
    """Return how many parts HF PEFT counts in the model: an encoder and a decoder of text are two."""
    return 2 if task_of(base) == _SEQ_TO_SEQ else 1


def encodes_and_decodes(base: nn.Module) -> bool:
    """Return whether the model has an encoder and a decoder of text."""
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def plain_token(base: nn.Module, vocabulary: int) -> int:
    """Return the first token id to which no config of the model gives a special meaning."""
    padding = {getattr(module, "padding_idx", None) for module in base.modules()}
    special = {*special_tokens(getattr(base, "config", None)), *padding}
    return next((i for i in range(vocabulary) if i not in special), 0)
