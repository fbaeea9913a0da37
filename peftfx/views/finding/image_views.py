"""Finds how a model of text and images reads images, by a run of its image encoder on fake tensors."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from peftfx.bases.config_fields import first_of
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.token_types import makes_masks, reads_types
from peftfx.errors import PeftfxError, first_line
from peftfx.graph.slots import listed
from peftfx.views.dry_run import fake_run
from peftfx.views.images import Images


def reads_images(base: nn.Module) -> bool:
    """Return whether a model reads images in its text, which transformers' `generate` encodes before the prefill."""
    own = getattr(base, "base_model", None)
    takes = "mm_encoder_outputs" in inspect.signature(base.forward).parameters
    return takes and "image" in (getattr(base, "input_modalities", None) or ()) and hasattr(own, "get_image_features")


def find_images(base: nn.Module) -> Images:
    """Return how a model reads images.

    Raises:
        PeftfxError: no example of an image is known, or the model's image encoder does not run on it.
    """
    accepted = inspect.signature(base.base_model.get_image_features).parameters  # type: ignore[union-attr, arg-type]
    token = first_of(base.config, "image_token_id", "image_token_index")
    made = example_inputs(base, sizes={"batch": 1})
    given = {name: value for name, value in made.items() if name in accepted}
    if not isinstance(token, int) or not given:
        what = "the model's config names no image token" if given else "peftfx cannot make an example of an image"
        raise PeftfxError(what, type(base).__name__, "export its forward view, with inputs=... of a call")
    typed = reads_types(base)
    if typed and not makes_masks(base):
        what = "the model's attention finds images by token types, and its class has no function that makes such masks"
        raise PeftfxError(what, type(base).__name__, "export its forward view")
    with fake_run(base) as fake:
        try:
            fed = {name: fake(value) for name, value in given.items()}
            pooled = base.base_model.get_image_features(**fed, return_dict=True).pooler_output  # type: ignore[union-attr, operator]
        except Exception as error:
            others = [n for n, p in accepted.items() if n not in given and "Tensor" in str(p.annotation)]
            why = f"it takes {listed(others, 3)} too, for which there is no example" if others else first_line(error)
            what = f"the model's image encoder does not run by itself: {why}"
            raise PeftfxError(
                what, type(base).__name__, "export its forward view, with inputs=... of a call"
            ) from error
    several = not isinstance(pooled, Tensor)
    first = pooled[0] if several else pooled
    each = int(first.shape[-2]) if not several and first.ndim > 2 else None
    inputs = tuple((name, value.ndim) for name, value in given.items())
    return Images(token, int(first.shape[-1]), first.dtype, each, several, inputs, typed)
