"""The report of an export as a page; of two side by side; and the commands that write pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command import Result
from torch import nn

import peftfx
from peftfx import PeftfxError
from peftfx.export.reports.report_page import report_page


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small export."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    adapted = peftfx.transform(model, "lora(r=2)@all-linear", inputs={"input": torch.randn(2, 8)})
    adapted.export(tmp_path_factory.mktemp("export") / "one")
    return tmp_path_factory.getbasetemp() / "export0" / "one"


def test_a_report_is_told_whole(exported: Path) -> None:
    html = report_page([exported]).html
    report = json.loads((exported / "peftfx_report.json").read_text(encoding="utf-8"))
    for name in (*report["bytes"], *report["seconds"], *report["tensors"], "LoRA", "output", "memory by stage"):
        assert name in html, name
    assert f"{report['bytes']['model.onnx']:,}" in html
    assert "src=" not in html


def test_reports_side_by_side_have_one_scale(exported: Path, tmp_path: Path) -> None:
    report = json.loads((exported / "peftfx_report.json").read_text(encoding="utf-8"))
    twice = {**report, "seconds": {name: 2 * taken for name, taken in report["seconds"].items()}}
    (tmp_path / "peftfx_report.json").write_text(json.dumps(twice), encoding="utf-8")
    widths = []
    for column in report_page([exported, tmp_path]).html.split("<h2>")[1:]:
        bars = column.partition("Time by stage")[2].partition("</table>")[0]
        widths.append([float(width) for width in re.findall(r"width:([\d.]+)%", bars)])
    assert max(widths[1]) == 100
    assert widths[0] == pytest.approx([width / 2 for width in widths[1]], abs=0.1)
    del twice["memory"]  # written where it cannot be told, or ahead of it
    (tmp_path / "peftfx_report.json").write_text(json.dumps(twice), encoding="utf-8")
    assert report_page([exported, tmp_path]).html.count("memory by stage") == 1


def test_what_is_no_report_is_told(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match=r"there is no peftfx_report\.json"):
        report_page([tmp_path])
    text = (exported / "peftfx_report.json").read_text(encoding="utf-8")
    for spoiled in (text[:-30], text.replace('"comparisons": [', '"comparisons": [{"output": 3}, '), '{"model": 3}'):
        (tmp_path / "peftfx_report.json").write_text(spoiled, encoding="utf-8")
        with pytest.raises(PeftfxError):
            report_page([tmp_path])


def test_commands_write_pages(exported: Path, tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    from transformers import BertConfig

    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**size, intermediate_size=48, architectures=["BertModel"])
    config.save_pretrained(tmp_path / "bert")
    page = tmp_path / "page.html"
    done = peftfx("report", str(exported), "--html", str(page))
    assert (done.code, page.is_file()) == (0, True)
    page.unlink()
    done = peftfx("inspect", str(tmp_path / "bert"), "--rules", "lora(r=5)@mlp", "--html", str(page))
    assert done.code == 0, done.err
    assert "LoRA r=5" in page.read_text(encoding="utf-8")
    for wrong in (
        ["--adapter", str(tmp_path)],
        ["--html", str(page), "--network"],
        ["--html", str(tmp_path / "no" / "p")],
    ):
        done = peftfx("inspect", str(tmp_path / "bert"), *wrong)
        assert done.code == 2, wrong
        assert "error:" in done.err
