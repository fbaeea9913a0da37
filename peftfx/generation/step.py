"""Steps of generation: a mixin for `GenerationMixin` that runs each step on a graph, in place of a model.

`GenerationMixin` calls its model for logits and gives it the cache, step by step. The mixin hands both to a graph, as
plain tensors. transformers does all the rest: sampling, beams, stopping, streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from peftfx.bases.processors.readers import ENCODED_IMAGES
from peftfx.caches.cache import cache_of, held, refuse
from peftfx.caches.held import kept_by
from peftfx.caches.states import StateCache
from peftfx.errors import PeftfxError
from peftfx.generation.invocation import OFFSETS, as_offsets, with_offsets
from peftfx.views.decode import Decode
from peftfx.views.row_adapters import IDS

Step = Callable[[dict[str, Tensor], Cache | None], Mapping[str, Tensor]]
"""A function that runs a view on its inputs, by name. It may keep memory for its results in the cache."""

#: Arguments of a forward that only change how results are returned, or that `generate` hands on from its own.
_HARMLESS = frozenset({"return_dict", "use_cache", "tokenizer"})
LOGITS_KEPT = "logits_to_keep"  #: the argument that says for which tokens a call gives logits


class GraphCache(StateCache):
    """A cache for tensors of a graph. It counts tokens by itself where no layer does.

    Attributes:
        seen: the number of tokens so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens so far."""
        counting = not self.layers or any(isinstance(layer, CacheLayerMixin) for layer in self.layers)
        return super().get_seq_length(layer_idx) if counting else self.seen


class Generates:
    """A mixin, before `GenerationMixin`, for a class that generates with a decode view.

    Attributes:
        view: the model's decode view.
        step: the function that runs the view.
    """

    view: Decode
    step: Step

    def new_cache(self) -> DynamicCache:
        """Return an empty cache."""
        return GraphCache()

    def beside(self) -> dict[str, Tensor]:
        """Return the inputs of the view other than the text and the cache."""
        return {}

    def stepped(self, inputs: dict[str, Tensor], cache: Cache) -> Mapping[str, Tensor]:
        """Return the outputs of the view, with all that the cache keeps."""
        return self.step(inputs, cache)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        logits_to_keep: int | Tensor = 0,
        adapter_ids: Tensor | None = None,
        alora_offsets: Tensor | None = None,
        **others: object,
    ) -> CausalLMOutputWithPast:
        """Run the graph, and return the logits and the cache, to which these tokens are added."""
        refuse_arguments(others)
        if input_ids is None:
            raise PeftfxError("the graph of the decode view reads tokens", "inputs_embeds", "pass input_ids")
        if others.get("use_cache") is False or cache is None:
            cache = self.new_cache()
        inputs = step_inputs(self.view, input_ids, attention_mask, position_ids, cache)
        if adapter_ids is not None:
            inputs[IDS] = adapter_ids
        if OFFSETS in self.view.axes:
            inputs[OFFSETS] = as_offsets([0] * len(input_ids) if alora_offsets is None else alora_offsets, input_ids)
        outputs = self.stepped(inputs | self.beside(), cache)
        cache_of(self.view.layers, [outputs[name] for name in self.view.present_names], cache)
        if isinstance(cache, GraphCache):
            cache.seen += input_ids.shape[1]
        logits = kept_logits(outputs["logits"], logits_to_keep)
        return CausalLMOutputWithPast(logits=logits, cache=cache)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does. Where rows invoke adapters is found once, in the whole prompt."""
        return super().generate(*args, **with_offsets(self.view, args, kwargs))  # type: ignore[misc]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Accept the rows' offsets, beside what the model's own class accepts."""
        own = {name: value for name, value in model_kwargs.items() if name != OFFSETS}
        super()._validate_model_kwargs(own)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: object
    ) -> None:
        """Give a cache of plain tensors. transformers might choose another kind."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            refuse(f"the kind {kind!r}")
        given = model_kwargs.get("cache")
        if given is not None:
            self._given_cache(given)
            given._is_user_defined = True  # as in transformers' own method
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = self._new_generation_cache()

    def _given_cache(self, given: Cache) -> None:
        held(given)  # this refuses unknown kinds of caches

    def _new_generation_cache(self) -> Cache:
        return self.new_cache()


def kept_logits(logits: Tensor, count: int | Tensor) -> Tensor:
    """Return the logits of the last tokens, as many as `count`; all for 0; or those at the places in a tensor."""
    return logits[:, slice(-count, None) if isinstance(count, int) else count]


def step_inputs(
    view: Decode, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: DynamicCache
) -> dict[str, Tensor]:
    """Return the inputs of a decode view for these tokens, which follow the tokens in the cache.

    Args:
        view: the view.
        tokens: int64[batch, sequence].
        mask: [batch, past + sequence]; None shows all tokens.
        positions: [batch or 1, sequence], perhaps with an axis before them; None counts on from the past.
        cache: an empty cache, or one filled by the view.

    Raises:
        PeftfxError: the mask is no mask of tokens, or is shorter than the text.
    """
    batch, length = tokens.shape
    past = held(cache)
    kept = kept_by(view.layers)
    if not past:
        past = [tensor.empty(batch, tokens.device) for tensor in kept]
    counted = [value.shape[t.along] for t, value in zip(kept, past, strict=True) if t.along is not None]
    if counted:
        before = counted[0]
    else:
        before = cache.seen if isinstance(cache, GraphCache) else 0 if mask is None else mask.shape[1] - length
    if mask is None:
        mask = torch.ones(batch, before + length, dtype=torch.long, device=tokens.device)
    made = {"input_ids": tokens, "attention_mask": as_mask(mask)}
    if mask.shape[1] < (whole := max(before, 0) + length):
        what = f"the mask tells of {mask.shape[1]} tokens, and there are {whole}"
        hint = "give a 1 or a 0 for each token of the text" + (f", the {before} in the cache too" if before > 0 else "")
        raise PeftfxError(what, "attention_mask", hint)
    if view.positions:
        if positions is None:
            positions = torch.arange(before, before + length, device=tokens.device)[None]
        made["position_ids"] = positions.long().expand(*view.rows_of_positions, batch, length)
    return made | dict(zip(view.past_names, past, strict=True))


def as_mask(mask: Tensor) -> Tensor:
    """Return a mask of tokens as the graphs take it, int64[batch, length].

    Raises:
        PeftfxError: the mask has other values than 0 and 1, or another shape.
    """
    hint = "pass what a tokenizer makes: 1 for each token that is seen, and 0 for padding"
    if mask.ndim != 2:
        raise PeftfxError(f"a mask is [batch, length], not {list(mask.shape)}", "attention_mask", hint)
    whole = mask.long()
    given = mask if mask.is_floating_point() else whole  # torch does not compare unsigned numbers with others
    wrong = (given != 0) & (given != 1)
    if bool(wrong.any()):
        raise PeftfxError(f"a mask has zeros and ones, not {given[wrong][0].item():g}", "attention_mask", hint)
    return whole


def refuse_arguments(others: Mapping[str, object], graph: str = "the graph of the decode view") -> None:
    """Refuse arguments that a graph cannot respect, or outputs that it does not give. None, False and 0 ask nothing."""
    for name, value in others.items():
        asks = value is not None and not (isinstance(value, int) and value == 0)
        if name == ENCODED_IMAGES and asks:  # transformers' generate encodes what a call gives beside its text
            what = f"{graph} reads text alone, and the call gives images, sounds or videos"
            raise PeftfxError(what, name, "give text alone")
        if name not in _HARMLESS and asks:
            hint = "leave it out, or call the base model" if name.startswith("output_") else "leave it out"
            raise PeftfxError(f"{graph} does not take this argument", name, hint)
