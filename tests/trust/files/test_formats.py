"""Formats: a newer file is refused with both versions, an older one is read, and a page has the fields of each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from house.structure import ROOT

from peftfx import PeftfxError
from peftfx.bases.labels import read_labels, write_labels
from peftfx.export import Report
from peftfx.formats import ADAPTER, BATCHED, FORMAT, LABELS, REPORT, RULES, SLOTS, VERSIONS, with_version
from peftfx.graph.slots import Manifest, Slot
from peftfx.rules.peft_files import rule_folders
from peftfx.serving.adapter_file import read_adapter_file, write_adapter_file
from peftfx.serving.pipelines import task_of_directory
from peftfx.serving.served import Served
from peftfx.version import __version__

PAGE = ROOT / "docs" / "formats.md"
SLOT = Slot("a", "lora_A", "layer", (4, "rank"), "float32")


def manifest(directory: Path) -> None:
    Manifest("", "Llama", "0" * 64, "float32", {"model": "forward"}, None, None, (SLOT,)).write(directory)


def batched(directory: Path) -> None:
    (directory / BATCHED).write_text(json.dumps(with_version(BATCHED, {"adapters": ["one"]})))


def rules(directory: Path) -> None:
    (directory / RULES).write_text(json.dumps(with_version(RULES, {"rules": ["1-lora"]})))


def row_adapters(directory: Path) -> list[str]:
    served = Served.__new__(Served)
    served.directory = directory
    return served.row_adapters


#: For each JSON file, what writes one into a directory, and what reads it.
FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    SLOTS: (manifest, Manifest.read),
    BATCHED: (batched, row_adapters),
    REPORT: (lambda directory: Report("BertForMaskedLM").write(directory), task_of_directory),
    RULES: (rules, rule_folders),
    LABELS: (lambda directory: write_labels(directory, ["cold", "warm"]), read_labels),
}


@pytest.mark.parametrize("name", FILES)
def test_a_version_is_respected(name: str, tmp_path: Path) -> None:
    write, read = FILES[name]
    write(tmp_path)
    own = json.loads((tmp_path / name).read_text())
    assert own[FORMAT] == VERSIONS[name]
    want = read(tmp_path)
    without = {key: value for key, value in own.items() if key != FORMAT}
    (tmp_path / name).write_text(json.dumps(without))
    assert read(tmp_path) == want  # from before there were versions
    newer = VERSIONS[name] + 1
    (tmp_path / name).write_text(json.dumps({**own, FORMAT: newer}))
    said = f"in format {newer}, and peftfx {re.escape(__version__)} reads formats up to {VERSIONS[name]}"
    with pytest.raises(PeftfxError, match=said) as raised:
        read(tmp_path)
    assert "install a newer peftfx" in raised.value.hint
    assert name in raised.value.where
    for wrong in ("1", True, 0, None, 1.5):
        (tmp_path / name).write_text(json.dumps({**own, FORMAT: wrong}))
        with pytest.raises(PeftfxError, match="not a version"):
            read(tmp_path)


def test_that_of_an_adapter_too(tmp_path: Path) -> None:
    path = tmp_path / f"a{ADAPTER}"
    write_adapter_file({"a": torch.zeros(2)}, 7, path)
    assert ort.AdapterFormat.read_adapter(str(path)).get_adapter_version() == VERSIONS[ADAPTER]
    assert read_adapter_file(path)[0] == 7
    newer = ort.AdapterFormat()
    newer.set_adapter_version(VERSIONS[ADAPTER] + 1)
    newer.set_model_version(7)
    value = ort.OrtValue.ortvalue_from_numpy(torch.zeros(2).numpy())
    newer.set_parameters({"a": value})
    newer.export_adapter(str(path))
    with pytest.raises(PeftfxError, match="reads formats up to 1"):
        read_adapter_file(path)


def test_the_page_has_each_format_and_its_fields() -> None:
    sections = dict(re.findall(r"^## `(.+?)`\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert set(sections) == set(VERSIONS)
    told = {name: re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))
            for name, text in sections.items()}  # fmt: skip
    assert set(told[SLOTS]) == {FORMAT, *(f.name for f in fields(Manifest))}
    assert set(told[REPORT]) == {FORMAT, *(f.name for f in fields(Report))}
    assert set(told[BATCHED]) == {FORMAT, "adapters"}
    assert set(told[RULES]) == {FORMAT, "rules"}
    assert set(told[LABELS]) == {FORMAT, "labels"}
    assert all(f"`{f.name}`" in sections[SLOTS] for f in fields(Slot))
    for name, text in sections.items():
        assert re.search(rf"version, {VERSIONS[name]}\b|format, {VERSIONS[name]}\.", text), name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_an_adapter_that_the_disk_has_no_room_for_is_told_in_words() -> None:
    """ONNX Runtime's error is none of the system's; `/dev/full` is a disk without room."""
    with pytest.raises(PeftfxError, match=r"cannot write the adapter(.|\n)*free some space"):
        write_adapter_file({"slot": torch.ones(3, 4)}, 1, Path("/dev/full"))
