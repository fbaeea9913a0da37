"""Slots: the places of an exported graph where adapters are put when it runs, and which graph an adapter is for.

A slot is an input that may be left out: an adapter's tensor, or nothing. A file beside the model lists them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peftfx.errors import PeftfxError, first_line, shown
from peftfx.field_types import misfits
from peftfx.files import is_file
from peftfx.formats import SLOTS, read_stamped, with_version
from peftfx.sites.site import Site

SLOTS_FILE = SLOTS
#: What slots hold. At a layer `W' = diag(OUTER) W diag(INNER) + B A`; ahead of the text embeddings, or keys and values
#: of all layers; beside an attention keys and values of a softmax of their own; and a tensor of the base itself.
SLOT_A, SLOT_B, INNER, OUTER, SLOT_PROMPT, PREFIX, KEYS, VALUES, SLOT_OWN = (
    *("lora_A", "lora_B", "input_scale", "output_scale", "prompt"),
    *("prefix", "beside.keys", "beside.values", "own"),
)
RANK, SLOT_TOKENS = "rank", "beside"  #: axes of any size; so are those named as what is ahead of the text
MODEL = "model"  #: the graph that most are


@dataclass(frozen=True)
class Slot:
    """One place.

    Attributes:
        name: of the input.
        what: what it holds, one of the words above.
        at: the path of the layer or attention; for `SLOT_OWN`, the tensor's name in the base; ahead of the text, empty.
        shape: with a word for an axis of any size: none, where nothing is put.
        dtype: as torch names it.
        perm: the order of axes in which the graph has the tensor of the base.
        least: the size of such an axis where nothing is put: 1 at a conv, which has some channels everywhere.
        behind: of keys and values beside an attention, whether they join behind its output projection.
        graph: which of the graphs, by its file's stem.
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
        """The shape of what changes nothing."""
        return tuple(self.least if isinstance(size, str) else size for size in self.shape)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits."""
        sizes = zip(self.shape, shape, strict=False)
        return len(self.shape) == len(shape) and all(isinstance(want, str) or want == got for want, got in sizes)


def shapes(site: Site) -> Mapping[str, tuple[int | str, ...]]:
    """The shapes of what slots hold at a site with a weight: factors as they are multiplied with there."""
    if site.kind == "conv":
        out, inner, ones = site.shape[0], site.shape[1] * site.groups, (1,) * (len(site.shape) - 2)
        return {SLOT_A: (RANK, inner, *site.shape[2:]), SLOT_B: (out, RANK, *ones), INNER: (inner,), OUTER: (out,)}
    inner, out = site.shape if site.transposed or site.kind == "embedding" else site.shape[::-1]
    return {SLOT_A: (inner, RANK), SLOT_B: (RANK, out), INNER: (inner,), OUTER: (out,)}


@dataclass(frozen=True)
class Manifest:
    """What `FILE` holds.

    Attributes:
        base: where the base was read from, or empty.
        model: its class.
        fingerprint: of its weights.
        dtype: that the graph computes in, as torch names it.
        views: what each graph is a view of, by its file's stem.
        atol, rtol: that adapters' verification allows; see `verify`.
        slots: of all graphs.
        fingerprint_version: how the fingerprint was made; see `peftfx.graph.fingerprint`.
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

    def write(self, directory: Path) -> None:
        """Put `SLOTS_FILE` into the directory."""
        (directory / SLOTS_FILE).write_text(
            json.dumps(with_version(SLOTS_FILE, asdict(self)), indent=1) + "\n", encoding="utf-8"
        )

    @staticmethod
    def read(directory: Path) -> Manifest:
        """What a directory's graphs have.

        Raises:
            PeftfxError: there is no such file, or it is not one.
        """
        path = directory / SLOTS_FILE
        if not is_file(path):
            hint = "export it with --swappable"
            raise PeftfxError(f"the model here takes no adapters: there is no {SLOTS_FILE}", str(directory), hint)
        raw: Any = read_stamped(path, "export the base again")
        try:
            slots = tuple(Slot(**{**s, "shape": tuple(s["shape"]), "perm": tuple(s["perm"])}) for s in raw.pop("slots"))
            found = Manifest(**raw, slots=slots)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"cannot be read: {first_line(error)}"
            raise PeftfxError(what, str(path), "export the base again") from error
        if wrong := _wrong(found):
            raise PeftfxError(f"cannot be read: {', '.join(wrong)}", str(path), "export the base again")
        return found

    @property
    def version(self) -> int:
        """A number of the base, which files of adapters carry."""
        return int(self.fingerprint[:7], 16)

    def by_place(self) -> Mapping[tuple[str, str], Sequence[Slot]]:
        """The slots by where they are and what they hold; two graphs may have one each for a layer that both run."""
        found: dict[tuple[str, str], list[Slot]] = {}
        for slot in self.slots:
            found.setdefault((slot.at, slot.what), []).append(slot)
        return found

    def of(self, graph: str) -> Mapping[str, Slot]:
        """The slots of one graph by their names."""
        return {slot.name: slot for slot in self.slots if slot.graph == graph}


def _wrong(manifest: Manifest) -> list[str]:
    """What of a manifest is not what it should be."""
    wrong = [*misfits(manifest), *(text for slot in manifest.slots for text in misfits(slot))]
    if wrong:
        return wrong
    dtypes = {manifest.dtype, *(slot.dtype for slot in manifest.slots)}
    wrong += [f"dtype={shown(name)}" for name in sorted(dtypes) if not isinstance(getattr(torch, name, 0), torch.dtype)]
    if not re.fullmatch(r"[0-9a-f]{64}", manifest.fingerprint):
        wrong.append(f"fingerprint={shown(manifest.fingerprint)}")
    return wrong


def listed(slots: Iterable[Slot] | Sequence[str], most: int = 6) -> str:
    """The first of some names."""
    names = [slot if isinstance(slot, str) else slot.at for slot in slots]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
