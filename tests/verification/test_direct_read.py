"""Parts of a file are read exactly, wherever they are, and whether the system reads past its cache or not."""

from __future__ import annotations

import errno
import io
import os
import random
from pathlib import Path

import pytest

from peftfx.export.writing import direct_read
from peftfx.export.writing.direct_read import DirectFile, span_of
from peftfx.memory.pages import PAGE, page_memory

SPANS = {
    "first page": (0, PAGE),
    "within a page": (5, 17),
    "about a page": (PAGE - 1, 2),
    "the end": (9 * PAGE - 7, 20),
}


@pytest.fixture(params=["direct", "refused when opened", "refused when read", "not known"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of nine pages and 13 bytes, on file systems that read directly, or not."""
    direct, opened = getattr(os, "O_DIRECT", 0), os.open

    def opening(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & direct and request.param == "refused when opened":
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    class Refusing(io.FileIO):
        def readinto(self, target: object) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

    if request.param == "not known":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    if request.param == "refused when read":
        monkeypatch.setattr(direct_read, "_open_direct", lambda path: Refusing(path))
    monkeypatch.setattr(os, "open", opening)
    path = tmp_path / "data"
    path.write_bytes(random.Random(0).randbytes(9 * PAGE + 13))
    return path


def test_every_span_is_read(file: Path) -> None:
    memory = memoryview(page_memory(10 * PAGE))
    with DirectFile(file) as opened:
        for offset, length in [*SPANS.values(), (0, 9 * PAGE + 13), (3, 8 * PAGE)]:
            assert span_of(offset, length) <= len(memory)
            assert bytes(opened.read_into(memory, offset, length)) == file.read_bytes()[offset : offset + length]


def test_a_span_past_the_end_is_an_error(file: Path) -> None:
    with DirectFile(file) as opened, pytest.raises(OSError, match="the file ends within the 20 bytes"):
        opened.read_into(memoryview(page_memory(PAGE)), 9 * PAGE, 20)


def test_spans_are_whole_pages() -> None:
    assert [span_of(0, 1), span_of(PAGE - 1, 1), span_of(PAGE - 1, 2), span_of(0, PAGE)] == [PAGE, PAGE, 2 * PAGE, PAGE]
