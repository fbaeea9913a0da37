"""Whatever happens to an export, its directory is whole and verified, or is not there, and the next run cleans up."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoint import Size, write_checkpoint
from support.few import but_for
from support.fork_server import CANNOT_MOUNT, Attempt, Attempts, attempts

from peftfx.cli.main import main
from peftfx.errors import PeftfxError
from peftfx.export import command
from peftfx.export.writing.atomic_directory import publish

SIZE = Size(layers=1, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=300)

Contents = dict[str, bytes]


@dataclass(frozen=True)
class Inputs:
    """A tiny checkpoint of five shards with a LoRA, and what the two exports of it are.

    Attributes:
        base, adapter: the directories.
        server: where commands run.
        merged, plain: the files of the whole exports, with the adapter and without.
        seconds: CPU time of an export.
    """

    base: Path
    adapter: Path
    server: Attempts
    merged: Contents
    plain: Contents
    seconds: float

    def words(self, output: Path, *more: object) -> list[object]:
        """The command that exports the merged model."""
        return ["export", "--base", self.base, "--adapter", self.adapter, "--output", output, *more]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    root = tmp_path_factory.mktemp("lost")
    write_checkpoint(root, SIZE, "fp16", shard=60_000)
    base = ["export", "--base", root / "base", "--output"]
    merged = [*base, root / "merged", "--adapter", root / "adapter"]
    with attempts(*merged) as server:
        assert server.run(*base, root / "plain").code == 0
        whole = server.run(*merged, "--force")
        assert whole.code == 0, whole.err
        found = contents(root / "merged"), contents(root / "plain")
        assert found[0] != found[1]
        yield Inputs(root / "base", root / "adapter", server, *found, whole.seconds)


def contents(directory: Path) -> Contents:
    """Every file of a directory, without the times in its report."""
    found = {p.name: p.read_bytes() for p in directory.iterdir()}
    with contextlib.suppress(KeyError):
        report = json.loads(found["peftfx_report.json"])
        found["peftfx_report.json"] = json.dumps({**report, "seconds": {}, "memory": {}}).encode()
    return found


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.further
class TestKilled:
    """SIGKILL: nothing of the program runs any more."""

    @pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.slow)])
    def test_at_random_points(self, count: int, inputs: Inputs, tmp_path: Path) -> None:
        output, killed, when = tmp_path / "out", 0, random.Random(count)
        for i in range(count):
            # Random within equal parts of the time, so that every stage is hit; a little beyond, so that some finish.
            after = inputs.seconds * 1.1 * (i + when.random()) / count
            done = inputs.server.run(*inputs.words(output), kill_after=after)
            assert done.killed or done.code == 0, done.err
            killed += done.killed
            assert output.exists() == (done.code == 0) or done.killed
            if output.exists():
                assert contents(output) == inputs.merged
                shutil.rmtree(output)
            assert len(names(tmp_path)) <= 1, "an earlier run's leftovers are still there"
        assert killed >= count * 3 // 4
        assert inputs.server.run(*inputs.words(output)).code == 0
        assert names(tmp_path) == ["out"]
        assert contents(output) == inputs.merged

    @pytest.mark.parametrize("there", [False, True], ids=["a new directory", "one that is replaced"])
    def test_at_every_change_of_the_disk(self, there: bool, inputs: Inputs, tmp_path: Path) -> None:
        """Files are as a kill leaves them when they are copied just before each change that the run makes."""
        place, copies = tmp_path / "place", tmp_path / "copies"
        place.mkdir()
        copies.mkdir()
        if there:
            assert inputs.server.run("export", "--base", inputs.base, "--output", place / "out").code == 0
        done = inputs.server.run(
            *inputs.words(place / "out", "--force"), setup="snapshots", option=[str(place), str(copies)]
        )
        assert done.code == 0, done.err
        assert contents(place / "out") == inputs.merged
        allowed = [inputs.merged, inputs.plain] if there else [inputs.merged]
        seen = []
        for copy in [*sorted(copies.iterdir()), place]:
            absent = not (copy / "out").exists()
            assert absent or contents(copy / "out") in allowed, copy.name
            with contextlib.suppress(PeftfxError), publish(copy / "out") as directory:
                (directory / "a").write_text("the next run's")
            assert names(copy) == ["out"], copy.name
            now = contents(copy / "out")
            assert now in (allowed if there else [*allowed, {"a": b"the next run's"}]), copy.name
            seen.append((absent, now == inputs.merged))
        assert len(seen) >= 8
        assert (True, False) in seen, "the moment between two moves" if there else "before the end"
        assert seen[-1] == (False, True)


@pytest.mark.parametrize("stage", ["load", "verify"])
@pytest.mark.parametrize(
    ("signal", "code", "word"), [("terminate", 143, "terminated"), ("interrupt", 130, "interrupted")]
)
def test_a_signal_ends_in_order_and_leaves_nothing(
    signal: str, code: int, word: str, stage: str, inputs: Inputs, tmp_path: Path
) -> None:
    done = inputs.server.run(*inputs.words(tmp_path / "out"), setup=signal, option=stage)
    assert done.code == code, done.err
    assert done.err.endswith(f"peftfx: {word}; no unfinished output is left\n")
    assert names(tmp_path) == []


def refused(done: Attempt, *texts: str) -> None:
    """Exit code 2, and one message that says all of `texts`."""
    assert done.code == 2, done.err
    assert done.err.count("peftfx: error: ") == 1
    assert "Traceback" not in done.err
    message = done.err.partition("peftfx: error: ")[2]
    for text in texts:
        assert text in message


class TestFullDisk:
    """The disk ends before the files do."""

    @pytest.mark.parametrize(
        "limit",
        [1000, pytest.param(50_000, marks=pytest.mark.slow), 90_000],
        ids=["at once", "in the weights", "late"],
    )
    def test_a_limit_on_files(self, limit: int, inputs: Inputs, tmp_path: Path) -> None:
        done = inputs.server.run(*inputs.words(tmp_path / "out"), setup="limit_files", option=limit)
        refused(done, "cannot write: File too large", "model.onnx")
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        ("room", "tokenizer", "text"),
        [
            (-100_000, 0, "are needed"),
            pytest.param(20_000, 0, "No space left", marks=pytest.mark.slow),
            (300_000, 400_000, "No space left"),
        ],
        ids=["less than the base", "enough for the weights alone", "enough for the model alone"],
    )
    def test_a_small_disk(self, room: int, tokenizer: int, text: str, inputs: Inputs, tmp_path: Path) -> None:
        base, disk, copy = tmp_path / "base", tmp_path / "disk", tmp_path / "copy"
        shutil.copytree(inputs.base, base)
        (base / "tokenizer.json").write_bytes(b" " * tokenizer)
        disk.mkdir()
        size = len(inputs.merged["model.onnx.data"]) + room
        words = ["export", "--base", base, "--adapter", inputs.adapter, "--output", disk / "out"]
        done = inputs.server.run(*words, setup="small_disk", option=[size, str(disk), str(copy)])
        if done.code == CANNOT_MOUNT:
            pytest.skip("no file system can be mounted here")
        refused(done, text, "hint: free ")
        assert names(copy) == []
        assert names(disk) == []


class TestMemory:
    """No memory is left. (Where the kernel kills instead, that is TestKilled.)"""

    @pytest.mark.parametrize(
        ("stage", "text"),
        [
            ("merge", "Cannot allocate memory"),
            pytest.param("write", "Cannot allocate memory", marks=pytest.mark.slow),
            ("convert", ""),
        ],
    )
    def test_none_left_is_one_message(self, stage: str, text: str, tmp_path: Path, inputs: Inputs) -> None:
        """While it converts, python's own errors come first, and do not always say that it is memory they lack."""
        done = inputs.server.run(*inputs.words(tmp_path / "out"), setup="out_of_memory", option=stage)
        assert names(tmp_path) == []
        refused(done, text)

    def test_where_not_a_byte_is_left_the_clean_up_has_its_own(self, tmp_path: Path, inputs: Inputs) -> None:
        done = inputs.server.run(setup="not_a_byte", option=str(tmp_path / "out"))
        assert "MemoryError" in done.err
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        "lacks", [lambda: torch.empty(1 << 58), lambda: bytearray(1 << 62)], ids=["torch", "python"]
    )
    def test_a_refused_allocation_is_no_traceback(
        self, lacks: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(command, "export_directory", lambda *_, **__: lacks())
        monkeypatch.setattr(sys, "argv", ["peftfx", "export", "--base", "base", "--output", "out"])
        with pytest.raises(SystemExit) as raised:
            main()
        assert raised.value.code == 2
        assert "peftfx: error: out of memory: " in capsys.readouterr().err


Damage = Callable[[Path], None]


def first_shard(base: Path) -> Path:
    return min(base.glob("*.safetensors"))


def cut(base: Path) -> None:
    path = first_shard(base)
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_header(base: Path) -> None:
    path = first_shard(base)
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def endless_header(base: Path) -> None:
    path = first_shard(base)
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def forget(base: Path) -> None:
    """The index does not name a shard that is there."""
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = first_shard(base).name
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != gone}
    path.write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a shard cut short": (cut, ("safetensors file is broken", "model-00001-of")),
    "a shard of no bytes": (
        lambda b: first_shard(b).write_bytes(b""),
        ("safetensors file is broken", "model-00001-of"),
    ),
    "a corrupt header": (spoil_header, ("safetensors file is broken", "model-00001-of")),
    "a header without end": (endless_header, ("safetensors file is broken", "model-00001-of")),
    "a shard that is not there": (lambda b: first_shard(b).unlink(), ("is missing", "model-00001-of")),
    "a shard that the index does not name": (forget, ("model.embed_tokens.weight", "base")),
    "a corrupt index": (
        lambda b: (b / "model.safetensors.index.json").write_text('{"weight_map": '),
        ("not valid JSON", "model.safetensors.index.json"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base_is_one_message_that_names_the_file(name: str, inputs: Inputs, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(inputs.base, base)
    damage, texts = DAMAGES[name]
    damage(base)
    words = ["export", "--base", base, "--adapter", inputs.adapter, "--output", tmp_path / "out"]
    refused(inputs.server.run(*words), *texts)
    assert names(tmp_path) == ["base"]


@pytest.mark.parametrize("stage", but_for({"capture", "verify"}, ["capture", "write", "verify"]))
def test_a_shard_cut_short_underneath_leaves_nothing(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    """A mapped file that shrinks is the system's SIGBUS: no message can be given, and nothing may be left for long."""
    base, output = tmp_path / "base", tmp_path / "out"
    shutil.copytree(inputs.base, base)
    words = ["export", "--base", base, "--adapter", inputs.adapter, "--output", output]
    done = inputs.server.run(*words, setup="cut_file", option=[stage, str(first_shard(base))])
    assert done.code != 0 or contents(output) == inputs.merged
    assert done.code == 0 or not output.exists()
    shutil.rmtree(base)
    shutil.copytree(inputs.base, base)
    assert inputs.server.run(*words, "--force").code == 0
    assert names(tmp_path) == ["base", "out"]
    assert contents(output) == inputs.merged


def test_a_shard_that_gets_other_weights_while_it_is_verified_leaves_nothing(inputs: Inputs, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    shutil.copytree(inputs.base, base)
    words = ["export", "--base", base, "--adapter", inputs.adapter, "--output", output]
    done = inputs.server.run(*words, setup="spoil_file", option=["verify", str(first_shard(base))])
    assert done.code in (1, 2), done.err
    assert done.err.count("peftfx: error: ") == 1
    assert names(tmp_path) == ["base"]
