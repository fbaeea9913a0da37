"""The end of a file of weights, which says whose it is: the graphs over these weights have the same digest.

A graph finds its weights by a file's name and by places in it. So the file of another export of the same sizes, with
another adapter merged, would be read without a message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from peftfx.errors import PeftfxError
from peftfx.files import is_file

DATA_KEY = "peftfx.data"  #: metadata key of a graph: the digest at the end of its file of weights, and the file's name
_MARK = b"peftfx.data "
_DIGITS = 32
_END = re.compile(_MARK + rb"([0-9a-f]{0,%d})\Z" % _DIGITS)  # of a file that was cut, the first digits are there


def data_end(digest: str) -> bytes:
    """Return the last bytes of a file of weights with this digest. No tensor of a graph is there."""
    return _MARK + digest[:_DIGITS].encode()


def told_data(digest: str, name: str) -> str:
    """Return what a graph's metadata tell of its file of weights."""
    return f"{digest[:_DIGITS]} {name}"


def refuse_other_data(graph: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a graph whose weights are in a file that another export wrote.

    A file without a digest passes, and so does one that the graph does not read: tools that write a model's weights
    anew keep its metadata.

    Raises:
        PeftfxError: the digest in the graph's metadata is not the one at the end of the file.
    """
    digest, _, name = metadata.get(DATA_KEY, "").partition(" ")
    data = graph.parent / name
    if not digest or not is_file(data):
        return
    with data.open("rb") as file:
        size = len(data_end(digest))
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        end = _END.search(file.read(size))
    if end is not None and not digest.startswith(end[1].decode()) and _reads(graph, name):
        hint = "copy the graph and its weights from one export, or export the model again"
        raise PeftfxError(f"{name} has the weights of another export", str(graph), hint)


def _reads(graph: Path, name: str) -> bool:
    """Whether a tensor of the graph is in this file: the graph has ONNX's entry `location`, as protobuf writes it."""
    file = name.encode()
    return b"\x08location\x12" + bytes([len(file)]) + file in graph.read_bytes()
