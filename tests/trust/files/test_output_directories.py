"""An export replaces what an export made, one at a time, and no kill or failure loses what was there."""

from __future__ import annotations

import ctypes
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.command import Result, assert_refused

from peftfx.errors import PeftfxError
from peftfx.export.slots.adapter_export import adapter_path
from peftfx.export.writing import file_lock
from peftfx.export.writing.atomic_directory import publish
from peftfx.export.writing.stream import Stream
from peftfx.files import write_file

REPORT = "peftfx_report.json"


def an_export(directory: Path, text: str) -> Path:
    """What an export leaves: its report, and a model."""
    directory.mkdir()
    return into(directory, text)


def into(directory: Path, text: str) -> Path:
    (directory / REPORT).write_text(json.dumps({"files": [REPORT, "model.onnx"]}))
    (directory / "model.onnx").write_text(text)
    return directory


def model(directory: Path) -> str:
    return (directory / "model.onnx").read_text()


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


class TestForceReplacesAnExportAlone:
    def test_or_an_empty_directory(self, tmp_path: Path) -> None:
        an_export(tmp_path / "old", "old")
        (tmp_path / "empty").mkdir()
        for name in ("old", "empty"):
            with publish(tmp_path / name, force=True) as place:
                into(place, "new")
            assert model(tmp_path / name) == "new"
        assert names(tmp_path) == ["empty", "old"]

    @pytest.mark.parametrize("what", ["files", "a file", "a link", "a link to nothing"])
    def test_and_nothing_else(self, what: str, tmp_path: Path) -> None:
        output, elsewhere = tmp_path / "out", an_export(tmp_path / "elsewhere", "theirs")
        if what == "files":
            output.mkdir()
            (output / "thesis.txt").write_text("years")
        elif what == "a file":
            output.write_text("years")
        else:
            output.symlink_to(elsewhere if what == "a link" else tmp_path / "nothing")
        before = names(tmp_path)
        said = "is a link" if "link" in what else "is not an earlier output"
        with pytest.raises(PeftfxError, match=said), publish(output, force=True):
            pytest.fail("it began")
        assert names(tmp_path) == before
        assert model(elsewhere) == "theirs"
        assert what != "files" or (output / "thesis.txt").read_text() == "years"

    @pytest.mark.parametrize("name", ["m.onnx", "model.safetensors"])
    def test_not_by_the_name_of_a_file(self, name: str, tmp_path: Path) -> None:
        """A runtime that is given such a path reads a file there."""
        with pytest.raises(PeftfxError, match="is a directory, but its name ends in"), publish(tmp_path / name):
            pytest.fail("it began")
        assert names(tmp_path) == []
        an_export(tmp_path / name, "old")  # one that stands there under this name is replaced all the same
        with publish(tmp_path / name, force=True) as place:
            into(place, "new")
        assert model(tmp_path / name) == "new"

    def test_not_what_somebody_has_added_to_it(self, tmp_path: Path) -> None:
        output = an_export(tmp_path / "out", "old")
        (output / REPORT).write_text(json.dumps({"files": ["model.onnx", REPORT]}))
        (output / ".DS_Store").write_text("")
        for name in ("french.onnx_adapter", "notes/monday.md"):
            (output / name).parent.mkdir(exist_ok=True)
            (output / name).write_text("mine")
        with pytest.raises(PeftfxError, match=r"added .*: french\.onnx_adapter, notes/"), publish(output, True):
            pytest.fail("it began")
        assert (output / "notes" / "monday.md").read_text() == model(output).replace("old", "mine") == "mine"
        (output / "french.onnx_adapter").unlink()
        shutil.rmtree(output / "notes")
        with publish(output, force=True) as place:
            into(place, "new")
        assert names(output) == ["model.onnx", REPORT]

    @pytest.mark.parametrize("output", ["", ".", "../inside", "..", "../..", "~", "~/..", "/"])
    @pytest.mark.parametrize("force", [True, False])
    def test_never_a_home_or_the_working_directory_or_what_holds_one(
        self, output: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even one that an export made."""
        inside, home = tmp_path / "a" / "inside", tmp_path / "b" / "home"
        for directory in (inside.parent, home.parent, inside, home):
            an_export(directory, "theirs")
        monkeypatch.chdir(inside)
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(PeftfxError, match=r"(working|home) directory"), publish(Path(output).expanduser(), force):
            pytest.fail("it began")
        assert model(inside) == model(home) == "theirs"
        assert names(tmp_path) == ["a", "b"]

    def test_what_was_put_there_meanwhile_stays(self, tmp_path: Path) -> None:
        output = an_export(tmp_path / "out", "old")
        with pytest.raises(PeftfxError, match="is not an earlier output"), publish(output, force=True) as place:  # noqa: PT012
            into(place, "new")
            shutil.rmtree(output)
            output.mkdir()
            (output / "thesis.txt").write_text("years")
        assert names(output) == ["thesis.txt"]
        assert names(tmp_path) == ["out"]

    @pytest.mark.parametrize("output", ["", "out"])
    def test_on_the_command_line_it_is_told_before_anything_is_loaded(
        self, output: str, peftfx: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "base").mkdir()
        (tmp_path / "here" / "out").mkdir(parents=True)
        (tmp_path / "here" / "out" / "thesis.txt").write_text("years")
        monkeypatch.chdir(tmp_path / "here")
        done = peftfx("export", "--base", tmp_path / "base", "--output", output, "--force")
        assert_refused(done, "is not an earlier output" if output else "is the working directory", "hint: ")
        assert (tmp_path / "here" / "out" / "thesis.txt").read_text() == "years"


class TestAdapterFiles:
    def test_force_replaces_an_adapter_file_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.onnx_adapter"
        path.write_text("years of notes")
        with pytest.raises(PeftfxError, match="not an adapter file"):
            adapter_path(path, force=True)
        with pytest.raises(PeftfxError, match="exists already"):
            adapter_path(path, force=False)
        with pytest.raises(PeftfxError, match="no file name"):
            adapter_path(Path(""), force=True)
        path.write_bytes(b"\x08\x00\x00\x00TORT\xe4\xff\xff\xff")
        assert adapter_path(tmp_path / "notes", force=True) == path

    def test_of_two_that_write_one_the_second_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a"

        def slowly(temporary: Path) -> None:
            temporary.write_text("second")
            write_file(path, lambda own: own.write_text("first"), replace=False)

        with pytest.raises(PeftfxError, match="exists already"):
            write_file(path, slowly, replace=False)
        assert path.read_text() == "first"
        assert names(tmp_path) == ["a"]


def apart() -> None:
    """Let what this process forks have a pid namespace of its own, where the system lets it."""
    new_user, new_pid = 0x10000000, 0x20000000
    ctypes.CDLL(None).unshare(new_user | new_pid)


def _race(output: Path, number: int, force: bool, ready: object, told: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    try:
        with publish(output, force) as place:
            into(place, str(number))
            told.put((number, "began"))  # type: ignore[attr-defined]
            ready.wait()  # type: ignore[attr-defined]  # until the other was told
        told.put((number, "done"))  # type: ignore[attr-defined]
    except PeftfxError as error:
        told.put((number, error.what))  # type: ignore[attr-defined]
        ready.wait()  # type: ignore[attr-defined]


class TestTwoAtOnce:
    @pytest.mark.parametrize("force", [False, True])
    def test_one_process_wins_and_the_other_is_told(self, force: bool, tmp_path: Path) -> None:
        context = multiprocessing.get_context("fork")
        if force:
            an_export(tmp_path / "out", "old")
        ready, told = context.Barrier(2), context.Queue()
        both = [context.Process(target=_race, args=(tmp_path / "out", n, force, ready, told)) for n in range(2)]
        for one in both:
            one.start()
        ends = dict([told.get(timeout=60) for _ in range(3)])
        for one in both:
            one.join(60)
        assert sorted(ends.values()) == ["another run is writing there", "done"]
        assert model(tmp_path / "out") == str(next(n for n, end in ends.items() if end == "done"))
        assert names(tmp_path) == ["out"]

    def test_threads_too(self, tmp_path: Path) -> None:
        errors: list[str] = []

        def second() -> None:
            try:
                with publish(tmp_path / "out"):
                    errors.append("it began")
            except PeftfxError as error:
                errors.append(error.what)

        with publish(tmp_path / "out") as place:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
            into(place, "first")
        assert errors == ["another run is writing there"]
        assert model(tmp_path / "out") == "first"

    def test_a_place_that_is_taken_meanwhile_is_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By something that takes no lock, at the last moment."""
        output, rename = tmp_path / "out", os.rename

        def taken(source: Path, target: Path) -> None:
            if not output.exists():
                an_export(output, "theirs")
            rename(source, target)

        monkeypatch.setattr("peftfx.export.writing.atomic_directory.os.rename", taken)
        with pytest.raises(PeftfxError, match="exists already"), publish(output) as place:
            into(place, "ours")
        assert model(output) == "theirs"
        assert names(tmp_path) == ["out"]

    def test_many_in_turn_leave_one_whole(self, tmp_path: Path) -> None:
        """They take and give back the lock again and again: none is lost on the way."""
        done: list[int] = []
        refused: set[str] = set()

        def often(number: int) -> None:
            for _ in range(60):
                try:
                    with publish(tmp_path / "out", force=True) as place:
                        into(place, str(number))
                    done.append(number)
                except PeftfxError as error:
                    refused.add(error.what)

        threads = [threading.Thread(target=often, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done
        assert refused <= {"another run is writing there"}
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out") == ["model.onnx", REPORT]


class TestWindows:
    """As far as it can be told from here: what Python lacks there is asked for by nobody, and its own lock is used."""

    @pytest.fixture(autouse=True)
    def _there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lock = fcntl.flock

        def locking(file: int, mode: int, length: int) -> None:
            """As msvcrt's: it does not wait, and says EACCES."""
            assert (mode, length) == (2, 1)
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PermissionError(13, "Permission denied") from error

        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
        monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails
        monkeypatch.setattr(file_lock, "sys", SimpleNamespace(platform="win32"))
        for name in ("O_DIRECT", "O_CLOEXEC", "O_NOFOLLOW"):
            monkeypatch.delattr(os, name, raising=False)

    def test_of_two_the_second_is_refused_and_nothing_is_left(self, tmp_path: Path) -> None:
        output = an_export(tmp_path / "out", "old")
        with publish(output, force=True) as place:
            with pytest.raises(PeftfxError, match="another run is writing there"), publish(output, force=True):
                pytest.fail("it began")
            into(place, "new")
            with Stream(place / "weights") as stream:
                stream.write(memoryview(bytearray(5 << 20)))
        assert model(output) == "new"
        assert (output / "weights").stat().st_size == 5 << 20
        assert names(tmp_path) == ["out"]

    def test_a_killed_runs_files_are_removed(self, tmp_path: Path) -> None:
        (tmp_path / ".out.peftfx" / "new").mkdir(parents=True)
        (tmp_path / ".out.peftfx" / "lock").touch()
        with publish(tmp_path / "out") as place:
            into(place, "new")
        assert names(tmp_path) == ["out"]


class TestLeftovers:
    """What a killed run leaves beside the output: `.out.peftfx`, with what is new and what stepped aside."""

    def test_a_live_writers_stay_whatever_its_process_is(self, tmp_path: Path) -> None:
        """In a pid namespace of its own its number says nothing here, and it may be anyone's."""
        began, go_on = os.pipe(), os.pipe()
        if (writer := os.fork()) == 0:
            apart()
            if (inner := os.fork()) == 0:
                with publish(tmp_path / "out") as place:
                    into(place, str(os.getpid()))
                    os.write(began[1], b"x")
                    os.read(go_on[0], 1)
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))
        os.read(began[0], 1)
        with pytest.raises(PeftfxError, match="another run is writing"), publish(tmp_path / "out", force=True):
            pytest.fail("it began")
        os.write(go_on[1], b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 0
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out") == ["model.onnx", REPORT]

    @pytest.mark.parametrize("force", [True, False])
    def test_what_stepped_aside_is_put_back_by_the_next_run(self, force: bool, tmp_path: Path) -> None:
        """The kill came between the two moves; the next run fails, too."""
        area = tmp_path / ".out.peftfx"
        area.mkdir()
        an_export(area / "old", "old")
        an_export(area / "new", "half")
        (area / "lock").write_text("")
        with pytest.raises(KeyboardInterrupt if force else PeftfxError), publish(tmp_path / "out", force):
            raise KeyboardInterrupt
        assert names(tmp_path) == ["out"]
        assert model(tmp_path / "out") == "old"

    def test_a_move_that_fails_puts_it_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the two moves the second: the old one has stepped aside by then."""
        output, rename = an_export(tmp_path / "out", "old"), os.rename

        def refuse(source: Path, target: Path) -> None:
            if Path(source).name == "new":
                raise OSError(5, "Input/output error")
            rename(source, target)

        monkeypatch.setattr("peftfx.export.writing.atomic_directory.os.rename", refuse)
        with pytest.raises(PeftfxError, match="Input/output error"), publish(output, force=True) as place:
            into(place, "new")
        assert model(output) == "old"
        assert names(tmp_path) == ["out"]

    def test_what_stands_aside_is_not_removed_for_something_foreign(self, tmp_path: Path) -> None:
        area = tmp_path / ".out.peftfx"
        area.mkdir()
        an_export(area / "old", "old")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years")
        with pytest.raises(PeftfxError, match="an earlier export is at"), publish(tmp_path / "out", force=True):
            pytest.fail("it began")
        assert model(area / "old") == "old"
        assert names(tmp_path / "out") == ["thesis.txt"]

    @pytest.mark.parametrize("name", [".out.99999999999999999999-x.new", ".out.²-a.old", ".out.-1-.new", ".out..new"])
    def test_odd_names_beside_it_are_left_alone(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).mkdir()
        with publish(tmp_path / "out") as place:
            into(place, "new")
        assert names(tmp_path) == sorted([name, "out"])

    @pytest.mark.parametrize("what", ["a file", "a link"])
    def test_what_is_no_directory_of_ours_is_not_written_into(self, what: str, tmp_path: Path) -> None:
        area, elsewhere = tmp_path / ".out.peftfx", an_export(tmp_path / "elsewhere", "theirs")
        area.write_text("x") if what == "a file" else area.symlink_to(elsewhere)
        with pytest.raises(PeftfxError, match="no directory"), publish(tmp_path / "out"):
            pytest.fail("it began")
        assert names(elsewhere) == ["model.onnx", REPORT]
