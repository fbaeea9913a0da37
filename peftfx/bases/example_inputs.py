"""Make example inputs for a model from its config and task."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.config_fields import first_of, number_of, special_tokens
from peftfx.bases.diffusion_inputs import denoiser_inputs, denoises
from peftfx.bases.dtypes import floating_dtype
from peftfx.bases.labels import class_labels
from peftfx.bases.processors.beside_text import BOXES, PLACES, has_image_axis, image_masks, random_boxes
from peftfx.bases.processors.codebooks import codes_shape
from peftfx.bases.processors.image_tokens import image_places, in_patches, token_and_count, tokens_of
from peftfx.bases.processors.pictures import (
    Picture,
    axes_of_pictures,
    picture_inputs,
    picture_size,
    repeated,
    seeing,
)
from peftfx.bases.processors.series import PAST_VALUES, PIXEL_VALUES, series_shape, video_inputs
from peftfx.bases.processors.sounds.in_text import sounds_in_text
from peftfx.bases.processors.sounds.recordings import fitted_shape, recording_name, recording_shape
from peftfx.bases.processors.token_types import MODALITIES, TYPES, makes_masks, prompt_types
from peftfx.bases.tasks import CHOOSING, resolve_task, task_of
from peftfx.errors import PeftfxError, nearest

#: The sizes of an example. They all differ, and none is 1, so that a capture does not confuse two axes or fix an axis.
#: `sequence` counts the text's tokens. If the prompt holds an image, the image's tokens are added.
_SIZES: Mapping[str, int] = {"batch": 2, "sequence": 7, "decoder_sequence": 5, "choices": 3}


def example_inputs(
    model: nn.Module,
    task: str | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    labels: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Make valid keyword arguments for a transformers model, on the CPU. Equal arguments give equal values.

    Args:
        model: the model. Its config, its class and the signature of its forward say what it takes. Its weights are not
            read.
        task: the task; by default the task of the model's class.
        sizes: the sizes `batch`, `sequence`, `decoder_sequence`, `choices`, `height` and `width` that differ from
            `_SIZES`, and from the image size in the config, or else in the model's processor file; and `images` or
            `sounds`, the number of these in all texts of a model that reads them in texts, by default one for each
            text. If the batch has several rows and the text is long enough, the last row is padded on the right.
        labels: add labels, so that the model computes a loss.
        seed: the seed of the random values.

    Raises:
        PeftfxError: the model is not a transformers model, takes an unknown input, or takes no labels.
    """
    unknown = set(sizes or ()) - {*_SIZES, "height", "width", "images", "sounds"}
    if unknown:
        name = min(unknown)
        raise PeftfxError(
            f"unknown size {name!r}", "sizes", nearest(name, _SIZES) or f"the sizes are {', '.join(_SIZES)}"
        )
    if denoises(model):
        return denoiser_inputs(model, {**_SIZES, **(sizes or {})}, torch.Generator().manual_seed(seed))
    if not _of_transformers(model):
        what = "peftfx makes example inputs only for transformers models"
        raise PeftfxError(what, type(model).__name__, _PASS_INPUTS + _model_inside(model))
    task = task_of(model) if task is None else resolve_task(task)
    with unset_fake_temporarily(), torch.device("cpu"):
        maker = _Maker(model, task, {**_SIZES, **(sizes or {})}, torch.Generator().manual_seed(seed))
        made = maker.inputs()
        if labels:
            made |= maker.labels(made)
    required = [n for n, p in maker.accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [name for name in required if name not in made]
    if missing or not made:
        what = f"peftfx cannot make an example of {', '.join(missing) or 'the inputs'}"
        raise PeftfxError(what, type(model).__name__, _PASS_INPUTS)
    return made


_CLASSIFYING = ("text-classification", "image-classification", "video-classification", "audio-classification")
_PART = "_input_ids"  #: the end of an argument's name: of tokens for a part of a model
#: Tokens of a text that names the task, as OneFormer reads them beside an image, and their vocabulary in the config.
_TASK, _TASK_VOCABULARY = "task_inputs", "text_encoder_vocab_size"
_PASS_INPUTS = "in Python, pass `inputs`, the keyword arguments of one call"


def _of_transformers(model: nn.Module) -> bool:
    return hasattr(model, "main_input_name") and hasattr(getattr(model, "config", None), "get_text_config")


def _model_inside(model: nn.Module) -> str:
    """Return what to do about a wrapper of a transformers model, such as a SentenceTransformer; empty for others."""
    path = next((path for path, module in model.named_modules() if _of_transformers(module)), None)
    return "" if path is None else f"; or adapt the transformers model inside, {path}, and put the result in its place"


@dataclass
class _Maker:
    """The model, task and sizes that one example is made from."""

    model: nn.Module
    task: str
    sizes: Mapping[str, int]
    random: torch.Generator
    accepted: Mapping[str, inspect.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = inspect.signature(self.model.forward).parameters
        self.config = self.model.config
        self.text = self.config.get_text_config()  # type: ignore[union-attr, operator]
        self.decodes = "decoder_input_ids" in self.accepted and bool(
            first_of(self.config, "is_encoder_decoder") or first_of(self.text, "is_encoder_decoder")
        )

    def inputs(self) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if self.image is not None:
            axes = axes_of_pictures(self.model) if self._images > 1 else {}
            made = repeated(self.image, self._images, self._floats, axes)
        if "input_ids" in self.accepted:
            made |= self._prompts_to_choose() if self.task == CHOOSING else self._prompt(self.sizes["batch"])
        made |= image_masks(self.model, self.accepted, made)
        if name := recording_name(self.model, self.accepted):
            shape = recording_shape(self.config, name, self.sizes["sequence"])
            if shape is None:
                raise PeftfxError(f"peftfx cannot make an example of {name}", type(self.model).__name__, _PASS_INPUTS)
            made[name] = self._floats(self.sizes["batch"], *fitted_shape(self.model, name, shape))
        if series := series_shape(self.config, self.accepted):
            made[PAST_VALUES] = self._floats(self.sizes["batch"], *series)
        if _TASK in self.accepted and isinstance(length := first_of(self.config, "task_seq_len"), int):
            made[_TASK] = self._integers((self.sizes["batch"], length), number_of(self.config, _TASK_VOCABULARY, 128))
        for name in (name for name in self.accepted if name.endswith(_PART) and name != "decoder_input_ids"):
            made |= self._prompt_of_part(name.removesuffix(_PART))
        if self.decodes and not self._pools_eos():
            made["decoder_input_ids"] = self._decoder_ids(made)
        elif self.image is None and "input_ids" in made and self.task != CHOOSING:
            made = self._with_codes(made)
        return made

    @property
    def _images(self) -> int:
        """How many images or sounds a call has."""
        return self.sizes.get("images", self.sizes.get("sounds", self.sizes["batch"]))

    def _with_codes(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put codes of several codebooks, without padding, in place of tokens, for a model that reads such."""
        ids = made["input_ids"]
        shape = codes_shape(self.model, self.text, "input_ids", (ids.shape[0], ids.shape[1]), {})
        if shape == ids.shape:
            return made
        masks = {name: torch.ones_like(made[name]) for name in made if name == "attention_mask" and len(shape) > 2}
        return {"input_ids": self._ids(shape), **masks}

    @cached_property
    def image(self) -> Picture | None:
        """The arguments of one image, or of one sound beside a text; None if the model's class reads texts alone.

        They are NaN where the pixels or the samples matter.
        """
        if "input_ids" in self.accepted and getattr(self.model, "input_modalities", None) == "text":
            return None
        found = picture_inputs(self.model, self.accepted, self._resolution())
        if found is not None:
            return found
        picture = torch.full((1, self._image("num_channels", 3), *self._resolution()), torch.nan)
        if (video := video_inputs(self.model, self.accepted, picture)) is not None:
            return video
        if PIXEL_VALUES not in self.accepted:
            tried = sounds_in_text(self.model, self.accepted)
            return next((sound for sound in tried if tokens_of(self.model, sound)), None)
        if has_image_axis(self.model, self.accepted):
            return {PIXEL_VALUES: picture[:, None]}
        return in_patches(self.model, {PIXEL_VALUES: picture}, self._image("patch_size", 1))

    def labels(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = self.sizes["batch"]
        classes = number_of(self.config, "num_labels", 2)
        if self.task == "question-answering" and "start_positions" in self.accepted:
            return {name: torch.full((batch,), i) for i, name in enumerate(("start_positions", "end_positions"))}
        if "labels" not in self.accepted or self.task == "feature-extraction":
            raise PeftfxError("the model takes no labels for this task", self.task, "name another task")
        if self.task == CHOOSING:
            return {"labels": self._integers((batch,), self.sizes["choices"])}
        if self.task in _CLASSIFYING:
            return {"labels": class_labels(self.config, batch, classes, self.random)}
        if self.task == "image-segmentation":
            return {"labels": self._integers((batch, *self._resolution()), classes)}
        if self.task == "token-classification":
            return {"labels": self._visible(self._integers(made["input_ids"].shape, classes), made)}
        if "decoder_input_ids" in made:
            return {"labels": self._ids(made["decoder_input_ids"].shape)}
        if "input_ids" in made:
            return {"labels": self._visible(made["input_ids"].clone(), made)}
        raise PeftfxError("peftfx cannot make labels for this task", self.task, _PASS_INPUTS)

    def _prompts_to_choose(self) -> dict[str, Tensor]:
        """Make several texts for each row, of which the model chooses one."""
        rows = self.sizes["batch"], self.sizes["choices"]
        return {name: value.unflatten(0, rows) for name, value in self._prompt(rows[0] * rows[1]).items()}

    def _prompt(self, batch: int) -> dict[str, Tensor]:
        """Make the text: image tokens first if the prompt holds images, and padding last."""
        length = self.sizes["sequence"]
        image, pieces = (None, 0) if self.image is None else self._image_tokens()
        places = image_places(batch, batch if self.task == CHOOSING else self._images, length, pieces)
        ids = torch.full(places.shape, image or 0)
        ids[~places] = self._ids((int((~places).sum()),))
        mask = torch.ones_like(ids)
        if batch > 1 and length > 3 and "attention_mask" in self.accepted:
            mask[-1, -2:] = 0
            pad = self._token("pad_token_id")
            if pad is not None:
                ids[-1, -2:] = pad
        eos = self._token("eos_token_id")
        if self._pools_eos() and eos is not None:
            ids[torch.arange(batch), mask.sum(1) - 1] = eos
        made = {"input_ids": ids, "attention_mask": mask} if "attention_mask" in self.accepted else {"input_ids": ids}
        if BOXES in self.accepted:
            most = number_of(self.text, "max_2d_position_embeddings", 1000)
            made[BOXES] = random_boxes(tuple(ids.shape), most, self.random)
        if pieces and PLACES in self.accepted:
            made[PLACES] = places.long()
        if "token_type_ids" in self.accepted and number_of(self.text, "type_vocab_size", 0) > 1:
            made["token_type_ids"] = (torch.arange(ids.shape[1]) > ids.shape[1] // 2).long().repeat(batch, 1)
        if pieces and MODALITIES in self.accepted:
            made[MODALITIES] = ids.eq(image or 0).long()
        if pieces and TYPES in self.accepted and makes_masks(self.model):
            made[TYPES] = prompt_types(self.model, ids.eq(image or 0))
        return made

    def _token(self, name: str) -> int | None:
        """Return a special token of the text, if it is in the vocabulary. SigLIP's config has the end of CLIP's."""
        token, vocabulary = number_of(self.text, name, -1), number_of(self.text, "vocab_size", sys.maxsize)
        return token if 0 <= token < vocabulary else None

    def _prompt_of_part(self, part: str) -> dict[str, Tensor]:
        """Make the text that a part of the model reads, such as a Q-Former, by the vocabulary in the part's config."""
        vocabulary = first_of(getattr(self.config, f"{part}_config", None), "vocab_size")
        if not isinstance(vocabulary, int):
            return {}
        ids = self._integers((self._images, self.sizes["sequence"]), vocabulary)
        made = {f"{part}{_PART}": ids, f"{part}_attention_mask": torch.ones_like(ids)}
        return {name: value for name, value in made.items() if name in self.accepted}

    def _pools_eos(self) -> bool:
        """Say whether the model reads its text's features at the end token: CLIP, or a classifier with a decoder."""
        both = {PIXEL_VALUES, "input_ids"} <= set(self.accepted) and not self.decodes
        two_towers = both and self._image_tokens()[0] is None
        return two_towers or (self.decodes and self.task == "text-classification")

    def _image_tokens(self) -> tuple[int | None, int]:
        """Return the token that stands for a piece of an image or sound, and the number of such tokens for one."""
        size, edge = self._resolution(), self._image("patch_size", 1)
        return token_and_count(self.model, self.image, PLACES in self.accepted, size, edge)

    def _decoder_ids(self, made: Mapping[str, Tensor]) -> Tensor:
        shape = (self.sizes["batch"], self.sizes["decoder_sequence"])
        text = self.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        ids = self._ids(codes_shape(self.model, text, "decoder_input_ids", shape, made))
        start = first_of(self.config, "decoder_start_token_id", "bos_token_id", "pad_token_id")
        if isinstance(start, int):
            ids[:, 0] = start
        return ids

    def _ids(self, shape: Sequence[int]) -> Tensor:
        """Make random tokens of the vocabulary, without special tokens."""
        text = self.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        sizes = ((text, "vocab_size"), (self.text, "vocab_size"), (self.text, "codebook_vocab_size"))
        known = [v for config, name in sizes if isinstance(v := first_of(config, name), int)]
        vocabulary = min(known, default=128)  # a model without a vocabulary reads characters: here ASCII's
        special = set(special_tokens(self.config))
        plain = torch.tensor([i for i in range(min(vocabulary, 4096)) if i not in special] or [0])
        return plain[self._integers(shape, len(plain))]

    def _integers(self, shape: Sequence[int], below: int) -> Tensor:
        return torch.randint(below, tuple(shape), generator=self.random)

    def _floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(floating_dtype(self.model))

    def _visible(self, labels: Tensor, made: Mapping[str, Tensor]) -> Tensor:
        """Mask labels at padding and at pieces of an image or sound."""
        if "attention_mask" in made:
            labels = labels.masked_fill(made["attention_mask"] == 0, -100)
        image = None if self.image is None else self._image_tokens()[0]
        return labels if image is None else labels.masked_fill(made["input_ids"] == image, -100)

    def _image(self, name: str, default: int) -> int:
        value = first_of(seeing(self.config), name)
        value = value[0] if isinstance(value, list | tuple) and value else value
        return value if isinstance(value, int) else default

    def _resolution(self) -> tuple[int, int]:
        height, width = picture_size(self.model)
        return self.sizes.get("height", height), self.sizes.get("width", width)
