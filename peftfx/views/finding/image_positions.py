"""Image positions: the positions of a text's tokens, where those of an image have one for each of several axes.

The code of such a model goes through a text piece by piece. For images of one size it comes to this: a token of text
goes on by one, the pieces of an image have offsets from the image's start, and an image goes on by a number of its own.
The numbers are read from what the model's own code gives for one text, and tried on others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftfx.bases.config_fields import special_tokens
from peftfx.bases.processors.token_types import MODALITIES
from peftfx.graph.contexts import unchanged

_Row = list[int | None]  #: a text: token ids, and None for an image


@dataclass(frozen=True)
class ImagePositions:
    """The positions of images of one size in a text.

    Attributes:
        offsets: for each section, the position of each piece of an image from the image's start.
        steps: for each section, by how much an image goes on.
    """

    offsets: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]

    def of(self, types: Tensor, mask: Tensor) -> Tensor:
        """Return the positions of tokens, int64[sections, batch, sequence]; 0 for padding.

        Args:
            types: 1 for tokens of an image, 0 for others, [batch, sequence].
            mask: which tokens are no padding, [batch, sequence].
        """
        shown = mask.bool()
        image = ((types == 1) & shown).long()
        text = ((types != 1) & shown).long()
        offsets = torch.tensor(self.offsets, device=mask.device)
        steps = torch.tensor(self.steps, device=mask.device)
        pieces = image.cumsum(-1) - image  # before the token
        whole = torch.div(pieces, offsets.shape[1], rounding_mode="floor")
        found = (text.cumsum(-1) - text) + steps[:, None, None] * whole
        return (found + offsets[:, pieces - whole * offsets.shape[1]] * image) * shown.long()


def find_image_positions(base: nn.Module, made: Mapping[str, Tensor], token: int, pieces: int) -> ImagePositions | None:
    """Return the positions of images, or None if the model's code is not seen to place them so.

    Args:
        base: the model; its class makes positions when it generates.
        made: the arguments of a call with one text, of which the first tokens stand for one image.
        token: the token of a piece of an image.
        pieces: how many tokens stand for one image.
    """
    if MODALITIES not in made:
        return None
    plain: list[int] = made["input_ids"][0, pieces:].tolist()
    others = {n: v for n, v in made.items() if n not in ("input_ids", "attention_mask", MODALITIES)}

    def call(rows: list[_Row], *, left: bool = False) -> dict[str, Tensor]:
        return {
            **_call(rows, token, pieces, left=left),
            **{n: torch.cat([v] * _count(rows)) for n, v in others.items()},
        }

    with unchanged(base), unset_fake_temporarily(), torch.device("cpu"):
        own = own_positions(base, call([[*plain[:3], None, *plain[3:]]]))
        if own is None or own.ndim != 3:
            return None
        start, end = own[:, 0, 3 : 3 + pieces] - 3, own[:, 0, 3 + pieces] - 3
        found = ImagePositions(tuple(map(tuple, start.tolist())), tuple(end.tolist()))
        ids = [i for i in special_tokens(base.config) if i != token]
        return found if _agrees(base, found, call, plain, ids) else None


def _agrees(
    base: nn.Module, found: ImagePositions, call: Callable[..., dict[str, Tensor]], plain: list[int], special: list[int]
) -> bool:
    """Return whether the model's code gives these positions for texts of many forms; those it refuses do not count."""
    several: list[_Row] = [[None, *plain], [*plain[:2], None, *plain[2:4], None, plain[4]], [*plain, None]]
    tried = [call([row]) for row in several]
    tried += [call(several[:2], left=left) for left in (False, True)]
    tried += [call([[plain[0], one, None, one, plain[1], None, plain[2]]]) for one in special]
    pairs = [(one, own_positions(base, one)) for one in tried]
    seen = [(one, want) for one, want in pairs if want is not None]
    same = (_same(found, one, want) for one, want in seen)
    return all(want is not None for _, want in pairs[: len(several)]) and all(same)


def _same(found: ImagePositions, call: Mapping[str, Tensor], want: Tensor) -> bool:
    got, shown = found.of(call[MODALITIES], call["attention_mask"]), call["attention_mask"].bool()
    return got.shape == want.shape and torch.equal(got[:, shown], want[:, shown])


def own_positions(base: Any, call: Mapping[str, Tensor]) -> Tensor | None:
    """Return the positions that the model's own code makes for a call, or None if it makes none or refuses the call.

    A class that generates makes them before its forward, and a class without a head inside its forward.
    """
    generates, computes = (getattr(base, name, None) for name in _MAKE_POSITIONS)
    try:
        if generates is not None:
            found = generates(call["input_ids"], dict(call))
        elif computes is not None:
            accepted = inspect.signature(computes).parameters
            found = computes(**{**dict.fromkeys(accepted), **{n: v for n, v in call.items() if n in accepted}})
        else:
            return None
    except Exception:  # whatever the model's code raises for a text that it does not take
        return None
    return found if isinstance(found, Tensor) else None


_MAKE_POSITIONS = ("_prepare_position_ids_for_generation", "compute_3d_position_ids")


def _call(rows: list[_Row], token: int, pieces: int, *, left: bool) -> dict[str, Tensor]:
    """Return the arguments of texts with images, padded on one side."""
    texts = [list(_tokens(row, token, pieces)) for row in rows]
    longest = max(map(len, texts))
    made: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], MODALITIES: []}
    for text in texts:
        lack = [0] * (longest - len(text))
        parts = [i for i, _ in text], [1] * len(text), [kind for _, kind in text]
        for name, part in zip(made, parts, strict=True):
            made[name].append([*lack, *part] if left else [*part, *lack])
    return {name: torch.tensor(value) for name, value in made.items()}


def _tokens(row: _Row, token: int, pieces: int) -> Iterator[tuple[int, int]]:
    for one in row:
        yield from [(token, 1)] * pieces if one is None else [(one, 0)]


def _count(rows: list[_Row]) -> int:
    return sum(one is None for row in rows for one in row)
