"""`prompt_in_view` says what a soft prompt is in each view of a model, given what it is in the forward.

| view | virtual tokens | a prefix |
| --- | --- | --- |
| decode | their keys and values in the cache, before the past | before the past |
| encoder | before the text | nothing |
| vision, audio | nothing | nothing |
| decoder | the encoded text includes them, its mask does not | before the past |
"""

from __future__ import annotations

import dataclasses

from peftfx.caches.held import width_of
from peftfx.errors import PeftfxError
from peftfx.views.cache_prefix import CachePrefix, Prefilled
from peftfx.views.decode import Decode
from peftfx.views.encoder_decoder import DECODED, Decoder, Encoder
from peftfx.views.entry import Entry, VirtualTokens
from peftfx.views.images.views import ImageEncoder
from peftfx.views.prefix import Prefix
from peftfx.views.sounds.views import SoundEncoder
from peftfx.views.view import View


def prompt_in_view(view: View, entry: Entry) -> tuple[View, Entry | None]:
    """Return the view under a soft prompt, and its entry, or None if the view does not see the prompt.

    Args:
        view: the base's view.
        entry: the entry of the base's forward.

    Raises:
        PeftfxError: the soft prompt has no place in this view.
    """
    if isinstance(view, ImageEncoder | SoundEncoder):
        return view, None
    if isinstance(entry, VirtualTokens):
        count = entry.shape[0]
        if isinstance(view, Decode):
            return view, Prefilled((count, width_of(view.layers)), entry.dtype, view.layers, tokens=entry)
        if isinstance(view, Encoder | Decoder):
            seen = dataclasses.replace(view, layers=dataclasses.replace(view.layers, ahead=count))
            return seen, entry if isinstance(view, Encoder) else None
    if isinstance(entry, Prefix):
        if isinstance(view, Decode):
            width_of(view.layers)  # this refuses caches that a prefix cannot precede
            return view, CachePrefix(entry.shape, entry.dtype, view.layers, plain=entry.plain)
        if isinstance(view, Decoder):
            return view, CachePrefix(entry.shape, entry.dtype, view.layers.own, DECODED)
        if isinstance(view, Encoder):
            return view, None
    what = f"the {view.name} view cannot take a soft prompt of the kind {type(entry).__name__}"
    raise PeftfxError(what, view.name, "use the forward view, or a method that acts on weights")
