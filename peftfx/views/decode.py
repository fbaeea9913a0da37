"""Decode: the view of a causal language model that generates, with its key/value cache as plain tensors.

    input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value

One graph serves prefill (a past of length 0), continuation and single tokens, at any batch, padded on either side:
mask and positions are inputs. The names are those that ONNX Runtime's users know.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxError, first_line
from peftfx.views.cache import Held, cache_of, held, refuse_unknown
from peftfx.views.dry_run import fake_run
from peftfx.views.view import Axes, RunView

PAST, PRESENT = "past_key_values", "present"
_SIZES: Mapping[str, int] = {"batch": 2, "sequence": 5, "past": 3}
_TRIALS: tuple[Mapping[str, int], ...] = (
    {"batch": 1, "sequence": 5, "past": 0},
    {"batch": 3, "sequence": 4, "past": 0},
    {"batch": 2, "sequence": 3, "past": 6},
    {"batch": 4, "sequence": 1, "past": 7},
    {"batch": 1, "sequence": 1, "past": 1},
)


@dataclass(frozen=True)
class Decode:
    """A causal model's decode view.

    Attributes:
        layers: what each layer of its cache holds.
        positions: whether the model takes `position_ids`; one that does not finds them from the mask or the past.
    """

    layers: tuple[Held, ...]
    positions: bool
    name = "decode"

    @property
    def axes(self) -> Axes:
        """The name of each input's axes."""
        text: dict[str, tuple[str | None, ...]] = {
            "input_ids": ("batch", "sequence"),
            "attention_mask": ("batch", "total"),
        }
        if self.positions:
            text["position_ids"] = ("batch", "sequence")
        return {**text, **dict.fromkeys(cache_names(PAST, len(self.layers)), ("batch", None, "past", None))}

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Valid inputs of this view; with room for it, the last row is padded on the left.

        Args:
            base: the model; its config alone is read.
            sizes: of `batch`, `sequence` and `past`, where they differ from `_SIZES`.
            seed: of the random values.
        """
        batch, sequence, past = ({**_SIZES, **(sizes or {})}[name] for name in _SIZES)
        with unset_fake_temporarily():
            random = torch.Generator().manual_seed(seed)
            mask = torch.ones(batch, past + sequence, dtype=torch.long)
            if batch > 1 and past + sequence > 2:
                mask[-1, :2] = 0
            made = {"input_ids": _unpadded(base, batch, sequence, seed), "attention_mask": mask}
            if self.positions:
                made["position_ids"] = positions(mask)[:, past:]
            return made | {
                name: torch.randn(batch, held.heads, past, width, generator=random).to(held.dtype)
                for i, held in enumerate(self.layers)
                for name, width in zip(cache_names(PAST, 1, i), (held.key, held.value), strict=True)
            }

    def with_past(
        self, base: nn.Module, inputs: Mapping[str, Tensor], run: RunView, seed: int = 0
    ) -> dict[str, Tensor]:
        """The same inputs behind a past that is what the model makes of a random text, which is padded alike.

        Args:
            base: the model; its config alone is read.
            inputs: of this view.
            run: runs the model.
            seed: of the text.
        """
        names = cache_names(PAST, len(self.layers))
        batch, past = inputs[names[0]].shape[0], inputs[names[0]].shape[2]
        if not past:
            return dict(inputs)
        mask = inputs["attention_mask"][:, :past]
        text = _unpadded(base, batch, past, seed + 1)
        feed = {**inputs, "input_ids": text, "attention_mask": mask, **{n: inputs[n][:, :, :0] for n in names}}
        if self.positions:
            feed["position_ids"] = positions(mask)
        made = run(self, feed)
        presents = zip(names, cache_names(PRESENT, len(self.layers)), strict=True)
        hidden = mask[:, None, :, None] == 0  # what is kept of padding is nobody's business, but a NaN would spread
        return {**inputs, **{name: made[present].masked_fill(hidden, 0.0) for name, present in presents}}

    def __call__(self, base: nn.Module, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Run the model on inputs of this view."""
        given = dict(inputs)
        past = [given.pop(name) for name in cache_names(PAST, len(self.layers))]
        cache = cache_of(past)  # type: ignore[arg-type]
        output = base(**given, cache=cache, use_cache=True)
        return {"logits": output.logits, **dict(zip(cache_names(PRESENT, len(self.layers)), held(cache), strict=True))}

    def shown(self, name: str, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Logits of the tokens that the mask shows, and the keys and values of these."""
        mask = inputs["attention_mask"].cpu() != 0
        if name == "logits":
            return value[mask[:, mask.shape[1] - value.shape[1] :]]
        return value.transpose(1, 2)[mask]

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:
        """Prefill, a continuation, and single tokens, alone and in a batch padded on the left."""
        return _TRIALS


def _unpadded(base: nn.Module, batch: int, sequence: int, seed: int) -> Tensor:
    """Random tokens, int64[batch, sequence]: an example's last row is padded, so there is one more to leave out."""
    return example_inputs(base, sizes={"batch": batch + 1, "sequence": sequence}, seed=seed)["input_ids"][:batch]


def cache_names(kind: str, count: int, first: int = 0, part: str = "") -> list[str]:
    """`past_key_values.0.key`, `past_key_values.0.value`, ... of `count` layers from `first` on.

    With a part, one of a layer's two caches: `past_key_values.0.decoder.key`.
    """
    inner = f".{part}" if part else ""
    return [f"{kind}.{i}{inner}.{what}" for i in range(first, first + count) for what in ("key", "value")]


def positions(mask: Tensor) -> Tensor:
    """Each token's position among those that the mask shows; 0 for padding, as transformers' `generate` has it."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def decode_view(base: nn.Module) -> Decode:
    """The decode view of a causal language model.

    Its layers are found by running the model on fake tensors, so its size costs nothing.

    Raises:
        PeftfxError: the model takes no cache, or one whose layers are not keys and values of every token.
    """
    accepted = inspect.signature(base.forward).parameters
    if "cache" not in accepted:
        what = "the model takes no key/value cache: it has no decode view"
        raise PeftfxError(what, type(base).__name__, "use the forward view")
    refuse_unknown(base)
    text = example_inputs(base, sizes={"batch": 2, "sequence": 3})
    if "attention_mask" not in text:
        what = "the model takes no attention mask: texts of different lengths could not be told apart in a batch"
        raise PeftfxError(what, type(base).__name__, "use the forward view")
    cache = cache_of([])
    with fake_run(base) as fake:
        given = {name: fake(text[name]) for name in ("input_ids", "attention_mask")}
        try:
            base(**given, cache=cache, use_cache=True)
        except Exception as error:
            what = f"the model does not run with a plain key/value cache: {first_line(error)}"
            raise PeftfxError(what, type(base).__name__, "use the forward view") from error
    pairs = held(cache)
    if not pairs:
        what = "the model leaves its key/value cache empty: it has no decode view"
        raise PeftfxError(what, type(base).__name__, "use the forward view")
    return Decode(
        tuple(Held.of(key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=True)),
        "position_ids" in accepted,
    )
