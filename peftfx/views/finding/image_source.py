"""The encoder of a text with images in it, of an encoder-decoder.

    vision:   pixel_values, ... -> image_features
    encoder:  input_ids, attention_mask, image_features -> last_hidden_state, present.N.encoder.key/value

The decoder is that of a text. A text without images has `image_features` of length 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.views.encoder_decoder import TEXT_INPUT, Encoder
from peftfx.views.images.encoded import IMAGE_FEATURES, IMAGE_TOKENS, Images
from peftfx.views.view import Axes


@dataclass(frozen=True)
class EncoderWithImages(Encoder):
    """The encoder of a model that reads images in the text that it encodes.

    Attributes:
        images: how the model reads images.
    """

    images: Images

    @property
    def axes(self) -> Axes:
        """The names of each input's axes."""
        return {**super().axes, IMAGE_FEATURES: (IMAGE_TOKENS, None)}

    @property
    def trials(self) -> tuple[Mapping[str, int], ...]:  # type: ignore[override]
        """Sizes for texts without images and with images."""
        few = self.images.each or 3
        return (
            *({**sizes, IMAGE_TOKENS: 0} for sizes in Encoder.trials[:2]),
            {"batch": 1, "encoder_sequence": few + 4, IMAGE_TOKENS: few},
            {"batch": 3, "encoder_sequence": few + 5, IMAGE_TOKENS: 2 * few},
        )

    def inputs(self, base: nn.Module, *, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Return valid inputs: a text with image tokens at the start of each row, and random features.

        If `sizes` are given, there are only as many image tokens as `image_tokens` says and as fit before the last
        three tokens of a row: whole images.
        """
        few = self.images.each or 3
        wanted = {"batch": 2, "encoder_sequence": few + 5, IMAGE_TOKENS: 2 * few} if sizes is None else {**sizes}
        count = wanted.pop(IMAGE_TOKENS, 0)
        made = super().inputs(base, sizes=wanted, seed=seed)
        with unset_fake_temporarily():
            made[TEXT_INPUT], made[IMAGE_FEATURES] = self.images.written.in_text(
                made[TEXT_INPUT], slice(-3), count, seed
            )
        return made

    def encode(self, base: nn.Module, inputs: Mapping[str, object]) -> Any:
        """Return what the model's own code encodes before it generates, given the features of the images."""
        given = dict(inputs)
        tokens, features = given.pop(TEXT_INPUT), given.pop(IMAGE_FEATURES)
        assert isinstance(features, Tensor)
        given["mm_encoder_outputs"] = {"image": self.images.as_output(features)}
        prepare: Any = base._maybe_prepare_encoder_kwargs_for_generation
        return prepare(tokens, given, TEXT_INPUT, base.generation_config)["encoder_outputs"]
