"""A Stream writes exactly the bytes it is given, whatever their sizes and places, and whatever the disk refuses."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from peftfx.export.writing import stream
from peftfx.export.writing.stream import Stream
from peftfx.memory.pages import PAGE

PIECES = {
    "nothing": [],
    "one byte": [1],
    "a page": [PAGE],
    "about a page": [PAGE - 1, 1, PAGE + 1, PAGE - 1],
    "about the buffer": [(4 << 20) - 1, 2, (4 << 20) + 5],
    "empty between": [0, 10, 0, PAGE, 0],
    "many small": [7] * 3000,
    "large and odd": [9 << 20, 3, (5 << 20) + 4097],
}


@pytest.fixture(params=["direct", "refused when opened", "refused when written", "not known"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """File systems that take direct writes, or not; the list says which writes were direct."""
    seen: list[bool] = []
    opened, wrote = os.open, os.write
    direct = getattr(os, "O_DIRECT", 0)

    def opening(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & direct and request.param == "refused when opened":
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    def writing(file: int, data: memoryview) -> int:
        import fcntl

        is_direct = bool(fcntl.fcntl(file, fcntl.F_GETFL) & direct)
        if is_direct and request.param == "refused when written":
            raise OSError(errno.EINVAL, "Invalid argument")
        seen.append(is_direct)
        return wrote(file, data)

    monkeypatch.setattr(stream.os, "open", opening)
    monkeypatch.setattr(stream.os, "write", writing)
    if request.param == "not known":
        monkeypatch.delattr(stream.os, "O_DIRECT")
    yield seen
    assert request.param == "direct" or not any(seen)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_the_file_has_the_bytes_in_their_order(name: str, aligned: bool, disk: list[bool], tmp_path: Path) -> None:
    path, want = tmp_path / "file", bytearray()
    rng = np.random.default_rng(3)
    with Stream(path) as file:
        for size in PIECES[name]:
            data = page_aligned(size) if aligned else bytearray(size + 1)[1:]
            data[:] = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
            file.write(memoryview(data))
            want += data
            assert file.position == len(want)
    assert path.read_bytes() == want


def page_aligned(size: int) -> memoryview:
    """Writable memory that starts on a page."""
    room = np.empty(size + PAGE, np.uint8)
    skip = -room.ctypes.data % PAGE
    return memoryview(room[skip : skip + size])


def test_padding_is_zeros_up_to_an_offset(tmp_path: Path) -> None:
    path, when = tmp_path / "file", random.Random(5)
    places: list[tuple[int, bytes]] = []
    with Stream(path) as file:
        for _ in range(40):
            offset = file.position + when.choice([0, 1, -file.position % PAGE, 10_000])
            file.pad(offset)
            data = when.randbytes(when.choice([1, 100, PAGE, 70_000]))
            file.write(memoryview(data))
            places.append((offset, data))
    found = path.read_bytes()
    for offset, data in places:
        assert found[offset : offset + len(data)] == data
    gaps = bytearray(found)
    for offset, data in places:
        gaps[offset : offset + len(data)] = bytes(len(data))
    assert not any(gaps)
    assert len(found) == places[-1][0] + len(places[-1][1])


def test_views_of_any_type_and_shape_are_their_bytes(tmp_path: Path) -> None:
    values = [np.arange(12.0).reshape(3, 4), np.float16([[1], [2]]), np.array(7), np.zeros((0, 5))]
    with Stream(tmp_path / "file") as file:
        for value in values:
            file.write(memoryview(value))
    assert (tmp_path / "file").read_bytes() == b"".join(v.tobytes() for v in values)


def test_a_file_that_was_there_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3 * PAGE)
    with Stream(tmp_path / "file") as file:
        file.write(memoryview(b"short"))
    assert (tmp_path / "file").read_bytes() == b"short"


@pytest.mark.parametrize("limit", [PAGE, PAGE + 5, 5 << 20])
@pytest.mark.parametrize("aligned", [False, True])
def test_what_the_system_refuses_is_its_own_error(limit: int, aligned: bool, tmp_path: Path) -> None:
    """Not EINVAL, which is what a direct write gives where the room ends within a page."""
    data = page_aligned(9 << 20) if aligned else memoryview(bytearray((9 << 20) + 1))[1:]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised, Stream(tmp_path / "file") as file:
            file.write(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert (tmp_path / "file").stat().st_size <= limit


def test_an_error_of_the_caller_closes_the_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), Stream(tmp_path / "file") as file:  # noqa: PT012
        file.write(memoryview(b"some"))
        _ = 1 / 0
    assert len(os.listdir("/proc/self/fd")) == before
