"""The text of a report: a model of many layers fits on one screen."""

from __future__ import annotations

from pathlib import Path

from support.zoo import ZOO

from peftfx.export import export_onnx
from peftfx.export.reports.series import in_series


def test_names_of_layers_are_told_once_for_one_shape() -> None:
    past = " [batch, past]"
    named = [("ids", " [batch]"), *((f"past.{n}.key", past) for n in (0, 1, 2, 5)), ("past.3.key", " [batch, 4]")]
    named += [("a.0.b.1.c", ""), ("a.1.b.1.c", ""), ("x.1", "")]
    assert in_series(named) == [
        "ids [batch]",
        "past.N.key [batch, past] for N = 0 to 2, 5",
        "past.3.key [batch, 4]",
        *("a.0.b.1.c", "a.1.b.1.c", "x.1"),  # two numbers, or none of a layer
    ]


def test_the_caches_of_a_decode_graph_are_on_few_lines(tmp_path: Path) -> None:
    model = ZOO["llama"].build().eval()
    report = export_onnx(model, tmp_path / "out", view="decode")
    layers = model.config.num_hidden_layers
    rows = dict(report.rows())
    assert (
        rows["outputs"] == f"logits, present.N.key for N = 0 to {layers - 1}, present.N.value for N = 0 to {layers - 1}"
    )
    assert len(report.outputs) == 1 + 2 * layers  # the report itself has each name
