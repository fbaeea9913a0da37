"""SequenceMethod: what a rule does ahead of the model's token stream, by virtual tokens or by their keys and values.

A sequence method says what fills the hole of an entry (`peftfx/views/entry.py`); the compiler traces that once and
splices it in. It depends on no input: merging makes a constant of it, whatever encoder it came from.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from peftfx.bases.config_fields import collect_configs
from peftfx.bases.guests import own_modules
from peftfx.bases.tasks import task_of
from peftfx.contract.method import PLACING, Method, Params
from peftfx.errors import PeftfxError
from peftfx.graph.graph import BASE
from peftfx.sites.site import SEQUENCE, Call, SequenceSite, Site
from peftfx.sites.sites import Sites
from peftfx.views.entry import Entry, VirtualTokens
from peftfx.views.prefix import Prefix, cache_shape

PROMPT = "prompt_embeddings"  #: HF PEFT's name for what is saved, and ours for a prompt without an encoder


@dataclass(frozen=True, kw_only=True)
class SequenceMethod(Method):
    """Soft prompts. They have no target: there is one stream of tokens.

    Args:
        num_virtual_tokens: how many virtual tokens.
        token_dim, num_layers, num_attention_heads, num_transformer_submodules: sizes of the model, by HF PEFT's names;
            read off the model where they are not given.
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
        """This method with every size that it was not given read off the model.

        Raises:
            PeftfxError: the model has no place for it, or a size that was given is not the model's.
        """

    @abstractmethod
    def init(self, site: SequenceSite, embed: nn.Module, rng: torch.Generator | None) -> dict[str, Tensor]:
        """New parameters; `embed` is the module that embeds the text. Only a sized method has any."""

    @abstractmethod
    def saved(self, p: Params, training: bool = False) -> Tensor:
        """What HF PEFT saves, computed from the parameters, or the parameter `PROMPT` itself where that is all."""

    def split(self, saved: Tensor) -> dict[str, Tensor]:
        """The parameters that a saved prompt stands for: one of that name, whatever made it, or those it is made of."""
        return {PROMPT: saved}

    @property
    def splits(self) -> bool:
        """Whether what is saved tells the parameters, which no file beside it has then."""
        return type(self).split is not SequenceMethod.split

    @abstractmethod
    def saved_shape(self) -> tuple[int, ...]:
        """The shape of what is saved."""

    def written(self, p: Params) -> dict[str, Tensor]:
        """The tensors of HF PEFT's file, by their names: the saved prompt, or parameters by their own names, too."""
        return {PROMPT: self.saved(p)}

    def written_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of these."""
        return {PROMPT: self.saved_shape()}

    @abstractmethod
    def virtual(self, p: Params, training: bool) -> Tensor:
        """What fills the hole of this method's entry; with a first axis of rows, where it is another for each."""

    @abstractmethod
    def entry(self, base: nn.Module, site: SequenceSite) -> Entry:
        """The way into the base that this method takes."""

    @property
    def submodules(self) -> int:
        """HF PEFT counts virtual tokens twice where there are an encoder and a decoder."""
        return self.num_transformer_submodules or 1


class PromptMethod(SequenceMethod):
    """Virtual tokens ahead of the text; HF PEFT's table has as many more rows for a decoder, which are never read."""

    def saved_shape(self) -> tuple[int, ...]:
        assert self.token_dim is not None
        return self.num_virtual_tokens * self.submodules, self.token_dim

    def virtual(self, p: Params, training: bool) -> Tensor:
        return self.saved(p, training)[: self.num_virtual_tokens]

    def entry(self, base: nn.Module, site: SequenceSite) -> Entry:
        return virtual_tokens(self.num_virtual_tokens, base, site)


_M = TypeVar("_M", bound=SequenceMethod)


def sequence_site(base: nn.Module, sites: Sites) -> SequenceSite:
    """The stream of tokens as a site: the argument that holds the ids, and the table that embeds them.

    Raises:
        PeftfxError: the model embeds no text.
    """
    found = [s for s in sites if s.role == "embedding.token" and s.calls and _owns_weight(base, s.path)]
    if not found:
        hint = "use a method that acts on weights, as LoRA"
        raise PeftfxError("the model embeds no text: a soft prompt has no place", type(base).__name__, hint)
    shared = getattr(input_embeddings(base), "weight", None)
    site = next((s for s in found if base.get_submodule(s.path).weight is shared), found[0])
    tokens = "input_ids" if hasattr(base, "main_input_name") else site.calls[0].x
    call = Call(tokens, "", "")
    weight = f"{BASE}.{site.path}.weight"
    return SequenceSite("", SEQUENCE, SEQUENCE, None, weight, None, site.shape, False, (), (call,))


def size_of(base: nn.Module, *names: str) -> int | None:
    """The first of these fields that the config of the model's text has."""
    config = getattr(base, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    values = (getattr(text, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def with_text_sizes(method: _M, base: nn.Module, site: Site) -> _M:
    """A method of virtual tokens with the model's sizes; those that no virtual token needs are HF PEFT's to read."""
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
    """The entry of so many virtual tokens."""
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
    """The entry of the keys and values of so many virtual tokens, in each layer.

    Raises:
        PeftfxError: the model keeps no keys and values.
    """
    both = encodes_and_decodes(base)
    layers, heads, features = cache_shape(base, both)
    shape = count, layers * 2 * heads * features
    return Prefix(shape, stream_dtype(base, site), heads, layers, both, untyped(base))


_SEQ_TO_SEQ = "text2text-generation"
_WITHOUT_TYPES = ("text-generation", "feature-extraction", _SEQ_TO_SEQ)  #: HF PEFT takes no token types there


def untyped(base: nn.Module) -> frozenset[str]:
    """The arguments that HF PEFT does not pass on under a soft prompt, by what the model is for."""
    return frozenset({"token_type_ids"} if task_of(base) in _WITHOUT_TYPES else ())


def stream_dtype(base: nn.Module, site: SequenceSite) -> torch.dtype:
    """The dtype of the embedded text."""
    weight = base.get_submodule(site.embedding).weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def submodules_of(base: nn.Module) -> int:
    """How many parts HF PEFT counts in the model: an encoder and a decoder of text are two."""
    return 2 if task_of(base) == _SEQ_TO_SEQ else 1


def encodes_and_decodes(base: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder of text."""
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def plain_token(base: nn.Module, vocabulary: int) -> int:
    """The first id to which no config of the model gives a meaning of its own."""
    special = set(_special_tokens(base))
    return next((i for i in range(vocabulary) if i not in special), 0)


def _special_tokens(base: nn.Module) -> Iterator[int]:
    seen: dict[int, object] = {}
    collect_configs(getattr(base, "config", None), seen)
    for config in seen.values():
        fields: Mapping[str, object] = config.to_dict() if hasattr(config, "to_dict") else {}
        for name, value in fields.items():
            if name.endswith(("_token_id", "_token_index")):
                yield from (i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int))
    padding = (getattr(module, "padding_idx", None) for module in base.modules())
    yield from (i for i in padding if isinstance(i, int))


def _owns_weight(base: nn.Module, path: str) -> bool:
    try:
        return isinstance(base.get_submodule(path)._parameters.get("weight"), Tensor)
    except AttributeError:
        return False


def embedding_path(base: nn.Module) -> str | None:
    """The path of the module that embeds the model's text, the first of those that lead to it; None if none is told."""
    wanted = input_embeddings(base)
    return None if wanted is None else next((path for path, m in own_modules(base) if m is wanted), None)


def input_embeddings(base: nn.Module) -> nn.Module | None:
    """The module that transformers calls the model's input embeddings; nothing for a model that tells of none."""
    try:
        return base.get_input_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError):
        return None
