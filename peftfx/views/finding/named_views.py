"""Finds the views of a model by their names: forward, decode, encoder, decoder, vision, video, audio."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from peftfx.bases.processors.readers import encodes_in_forward, reads_images, why_not_in_source
from peftfx.bases.processors.videos import takes_videos
from peftfx.errors import PeftfxError, nearest
from peftfx.views.decode import Decode
from peftfx.views.encoder_decoder import Decoder, Encoder, EncoderDecoderLayers
from peftfx.views.finding.cross_images import (
    CrossEncoder,
    crosses,
    decode_over_images,
    find_cross_images,
    why_not_crossed,
)
from peftfx.views.finding.decode_view import decode_view
from peftfx.views.finding.encoder_decoder_layers import find_layers
from peftfx.views.finding.image_source import EncoderWithImages
from peftfx.views.finding.image_views import find_images
from peftfx.views.finding.of_sites.image_text import IMAGE_TEXT, image_text
from peftfx.views.finding.sound_views import find_sounds
from peftfx.views.finding.video_views import find_videos
from peftfx.views.images.encoded import VISION
from peftfx.views.images.video_views import DecodeWithVideos, VideoEncoder
from peftfx.views.images.videos import VIDEO
from peftfx.views.images.views import DecodeWithImages, ImageEncoder
from peftfx.views.sounds.beside_images import DecodeWithImagesAndSounds, DecodeWithVideosAndSounds
from peftfx.views.sounds.encoded import AUDIO, Sounds
from peftfx.views.sounds.views import DecodeWithSounds, SoundEncoder
from peftfx.views.view import View

_NAMES = ("forward", "decode", "encoder", "decoder", VISION, VIDEO, AUDIO)


def find_view(base: nn.Module, name: str) -> View | None:
    """Return the view of this name of a model, or None for its forward.

    Raises:
        PeftfxError: the name is unknown, or the model has no such view.
    """
    if name == "forward":
        return None
    if name == "decode":
        return decode_over_images(base) if _crossed(base) else _decode(base)
    if name == VISION and _crossed(base):
        return CrossEncoder(find_cross_images(base))
    if name == VISION:
        return ImageEncoder(find_images(base))
    if name == VIDEO:
        return VideoEncoder(find_videos(base))
    if name == AUDIO:
        return SoundEncoder(find_sounds(base))
    if name == IMAGE_TEXT:
        return image_text(base, find_images(base, of_any_size=True), _sounds(base))
    if name in ("encoder", "decoder"):
        layers = find_layers(base)
        return _encoder(base, layers) if name == "encoder" else Decoder(layers)
    raise PeftfxError(f"there is no view {name!r}", "view", nearest(name, _NAMES) or f"one of {', '.join(_NAMES)}")


def _crossed(base: nn.Module) -> bool:
    return crosses(base) and not why_not_crossed(base)


def view_of_sites(base: nn.Module) -> str:
    """Return the name of the view that runs all of a model: its forward, or, if the model's code reads values of an
    image's arguments, a call in which these are constants, or, if it reads sounds too, a call with both.
    """
    if encodes_in_forward(base):
        with suppress(PeftfxError):
            images = find_images(base, of_any_size=True)
            return IMAGE_TEXT if images.reads or _sounds(base) is not None else _NAMES[0]
    return _NAMES[0]


def _encoder(base: nn.Module, layers: EncoderDecoderLayers) -> Encoder:
    """Return the encoder's view, with an input for images if its text can have some and their form can be found."""
    if not layers.masked or why_not_in_source(base):
        return Encoder(layers)
    try:
        return EncoderWithImages(layers, find_images(base))
    except PeftfxError:
        return Encoder(layers)  # takes only text; the export warns of this


def _decode(base: nn.Module) -> Decode:
    """Return the decode view, with an input for images or sounds if the model reads them and their form can be found.

    Otherwise the view takes only text, and the export warns of this.
    """
    images, sounds = None, _sounds(base)
    if reads_images(base):
        with suppress(PeftfxError):
            images = find_images(base)
    view = decode_view(base, images)
    text, new = (view.layers, view.positions), view.new_mask
    if images is None:
        return view if sounds is None else DecodeWithSounds(*text, sounds, new_mask=new)
    if takes_videos():
        videos = find_videos(base)
        if sounds is None:
            return DecodeWithVideos(*text, images, videos, new_mask=new)
        return DecodeWithVideosAndSounds(*text, images, videos, sounds, new_mask=new)
    if sounds is None:
        return DecodeWithImages(*text, images, new_mask=new)
    return DecodeWithImagesAndSounds(*text, images, sounds, new_mask=new)


def _sounds(base: nn.Module) -> Sounds | None:
    try:
        return find_sounds(base)
    except PeftfxError:
        return None
