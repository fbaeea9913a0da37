"""Slots: the optional inputs of an exported graph that take an adapter's tensors at run time.

An input that is left out changes nothing. A file beside the model lists the slots, and names the base that adapters
must have been trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from peftfx.errors import PeftfxError, first_line, shown
from peftfx.field_types import misfits
from peftfx.files import is_file, is_folder
from peftfx.formats import SLOTS, read_stamped, with_version
from peftfx.sites.site import Site

SLOTS_FILE = SLOTS
#: What a slot can hold. At a layer: the tensors of `W' = diag(OUTER) W diag(INNER) + B A`. Before the text: embeddings,
#: or keys and values of all layers. Beside an attention: keys and values of a separate softmax. And a tensor that
#: replaces one of the base's.
SLOT_A, SLOT_B, INNER, OUTER, SLOT_PROMPT, PREFIX, KEYS, VALUES, SLOT_OWN = (
    *("lora_A", "lora_B", "input_scale", "output_scale", "prompt"),
    *("prefix", "beside.keys", "beside.values", "own"),
)
RANK, SLOT_TOKENS = "rank", "beside"  #: names of axes of any size; `SLOT_PROMPT` and `PREFIX` are such names too
MODEL = "model"  #: the usual name of a graph


@dataclass(frozen=True)
class Slot:
    """One slot of a graph.

    Attributes:
        name: the input's name.
        what: what the slot holds, one of the words above.
        at: the path of the layer or attention; for `SLOT_OWN`, the tensor's name in the base; empty before the text.
        shape: the tensor's shape, with a word for each axis of any size. Such an axis has size `least` in an empty
            slot.
        dtype: the dtype's name in torch.
        perm: the order of axes in which the graph reads the base's tensor.
        least: the size of axes of any size in an empty slot: 1 at a conv, which cannot have 0 channels.
        behind: whether the result of keys and values beside an attention is added after its output projection.
        graph: the stem of the graph's file.
    """

    name: str
    what: str
    at: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    perm: tuple[int, ...] = ()
    least: int = 0
    behind: bool = False
    graph: str = MODEL

    @property
    def empty(self) -> tuple[int, ...]:
        """The shape of a tensor for this slot that changes nothing."""
        return tuple(self.least if isinstance(size, str) else size for size in self.shape)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of this shape fits."""
        sizes = zip(self.shape, shape, strict=False)
        return len(self.shape) == len(shape) and all(isinstance(want, str) or want == got for want, got in sizes)


def shapes(site: Site) -> Mapping[str, tuple[int | str, ...]]:
    """Return the shapes of the slots at a site with a weight. Factors are in the layout of their products."""
    if site.kind == "conv":
        out, inner, ones = site.shape[0], site.shape[1] * site.groups, (1,) * (len(site.shape) - 2)
        return {SLOT_A: (RANK, inner, *site.shape[2:]), SLOT_B: (out, RANK, *ones), INNER: (inner,), OUTER: (out,)}
    inner, out = site.shape if site.transposed or site.kind == "embedding" else site.shape[::-1]
    return {SLOT_A: (inner, RANK), SLOT_B: (RANK, out), INNER: (inner,), OUTER: (out,)}


@dataclass(frozen=True)
class Manifest:
    """The contents of `SLOTS_FILE`.

    Attributes:
        base: the place that the base was read from, or empty.
        model: the base's class.
        fingerprint: the hash of the base's weights.
        dtype: the dtype that the graph computes in, by its name in torch.
        views: the view of each graph, by the stem of the graph's file.
        atol, rtol: the tolerances of adapters' verification; see `verify`.
        slots: the slots of all graphs.
        fingerprint_version: the version of the fingerprint; see `peftfx.graph.fingerprint`.
        lost: the largest relative error of the graphs with random adapters, if their weights were rounded.
        image_size: the height and width of images, or `any`, if they were chosen.
    """

    base: str
    model: str
    fingerprint: str
    dtype: str
    views: Mapping[str, str]
    atol: float | None
    rtol: float | None
    slots: tuple[Slot, ...]
    fingerprint_version: int = 1
    lost: float | None = None
    image_size: tuple[int, int] | Literal["any"] | None = None

    def write(self, directory: Path) -> None:
        """Write `SLOTS_FILE` into the directory."""
        (directory / SLOTS_FILE).write_text(
            json.dumps(with_version(SLOTS_FILE, asdict(self)), indent=1) + "\n", encoding="utf-8"
        )

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Read the manifest of a directory's graphs.

        Raises:
            PeftfxError: there is no such file, or its contents are no manifest.
        """
        path = directory / SLOTS_FILE
        if not is_file(path):
            if not is_folder(directory):
                raise PeftfxError(
                    "there is no such directory", str(directory), "`peftfx export --swappable` writes one"
                )
            hint = "export it with --swappable"
            raise PeftfxError(f"the model here takes no adapters: there is no {SLOTS_FILE}", str(directory), hint)
        raw: Any = read_stamped(path, "export the base again")
        try:
            slots = tuple(Slot(**{**s, "shape": tuple(s["shape"]), "perm": tuple(s["perm"])}) for s in raw.pop("slots"))
            size = raw.pop("image_size", None)
            found = Manifest(**raw, slots=slots, image_size=tuple(size) if isinstance(size, list) else size)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"cannot be read: {first_line(error)}"
            raise PeftfxError(what, str(path), "export the base again") from error
        if wrong := _wrong(found):
            raise PeftfxError(f"cannot be read: {', '.join(wrong)}", str(path), "export the base again")
        return found

    @property
    def version(self) -> int:
        """A number of the base, which adapters' files carry."""
        return int(self.fingerprint[:7], 16)

    def by_place(self) -> Mapping[tuple[str, str], Sequence[Slot]]:
        """Return the slots by place and content. Two graphs that run the same layer may have one slot each."""
        found: dict[tuple[str, str], list[Slot]] = {}
        for slot in self.slots:
            found.setdefault((slot.at, slot.what), []).append(slot)
        return found

    def of(self, graph: str) -> Mapping[str, Slot]:
        """Return the slots of one graph, by their names."""
        return {slot.name: slot for slot in self.slots if slot.graph == graph}


def _wrong(manifest: Manifest) -> list[str]:
    """Return the fields of a manifest that have wrong values."""
    wrong = [*misfits(manifest), *(text for slot in manifest.slots for text in misfits(slot))]
    if wrong:
        return wrong
    dtypes = {manifest.dtype, *(slot.dtype for slot in manifest.slots)}
    wrong += [f"dtype={shown(name)}" for name in sorted(dtypes) if not isinstance(getattr(torch, name, 0), torch.dtype)]
    if not re.fullmatch(r"[0-9a-f]{64}", manifest.fingerprint):
        wrong.append(f"fingerprint={shown(manifest.fingerprint)}")
    return wrong
