"""Exported directories and adapters for them: a spoiled one opens, or is refused in one message."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from fuzz.settle import cases, settle
from fuzz.twins import ADAPTER
from fuzz.values import Change, changed, changes, raw_texts, values, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from peftfx import runtime
from peftfx.graph.slots import SLOTS_FILE, Manifest
from peftfx.serving.adapter_file import read_for
from peftfx.serving.pipelines import task_of_directory

FIELDS = {
    SLOTS_FILE: ("base", "model", "fingerprint", "dtype", "views", "atol", "rtol", "slots"),
    "config.json": ("model_type", "architectures", "hidden_size", "num_hidden_layers", "dtype", "pad_token_id"),
    "generation_config.json": ("eos_token_id", "max_length", "do_sample", "temperature", "cache_implementation"),
    "peftfx_report.json": ("model", "files", "outputs"),
}
SLOT = ("name", "what", "at", "shape", "dtype", "perm", "least", "behind", "graph")
DAMAGES = ("none", "half", "empty", "text", "gone", "folder")


@dataclass(frozen=True)
class Spoiled:
    """One file of the directory and what is done to it: fields of an object, its text, or its bytes."""

    file: str
    fields: tuple[Change, ...] = ()
    slot: tuple[Change, ...] = ()
    text: str | None = None
    damage: str = "none"

    def apply(self, directory: Path) -> None:
        path = directory / self.file
        if self.fields:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_json(path, changed(found, self.fields))
        if self.slot:
            found = json.loads(path.read_text(encoding="utf-8"))
            found["slots"][0] = changed(found["slots"][0], self.slot)
            write_json(path, found)
        if self.text is not None:
            path.write_text(self.text, encoding="utf-8", errors="replace")
        whole = path.read_bytes() if path.is_file() else b""
        match self.damage:
            case "half" | "empty":
                path.write_bytes(whole[: len(whole) // 2] if self.damage == "half" else b"")
            case "text":
                path.write_bytes(b"no such format")
            case "gone" | "folder":
                path.unlink(missing_ok=True)
                if self.damage == "folder":
                    path.mkdir()


def _fields(file: str) -> st.SearchStrategy[Spoiled]:
    return st.builds(Spoiled, st.just(file), changes(FIELDS[file]).map(tuple))


spoils = st.one_of(
    *map(_fields, FIELDS),
    st.builds(Spoiled, st.just(SLOTS_FILE), slot=changes(SLOT, values).map(tuple)),
    st.builds(Spoiled, st.sampled_from(sorted(FIELDS)), text=raw_texts),
    st.builds(Spoiled, st.sampled_from([*FIELDS, ADAPTER, "model.onnx"]), damage=st.sampled_from(DAMAGES)),
)


@cases(quick=30, many=1500)
def test_a_spoiled_export_opens_or_is_refused(cases: settings, exported: Path, tmp_path: Path) -> None:
    @cases
    @given(spoils)
    def check(spoil: Spoiled) -> None:
        serve(spoil, exported, tmp_path / "graph")

    check()


def serve(spoil: Spoiled, exported: Path, directory: Path) -> None:
    """One case."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(exported, directory)
    spoil.apply(directory)
    settle(lambda: Manifest.read(directory))
    settle(lambda: read_for(directory / ADAPTER, directory))
    settle(lambda: task_of_directory(directory))
    settle(lambda: runtime.load(directory, threads=1, adapter=directory / ADAPTER))
    if spoil.file != "model.onnx":
        settle(lambda: runtime.load(directory, threads=1))
