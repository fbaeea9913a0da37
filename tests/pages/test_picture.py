"""The picture of a model: one file, everything in it, equal layers once; by a browser too."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.zoo import Captured
from torch import nn

import peftfx
from peftfx import PeftfxError
from peftfx.pages.layout import BOX_HEIGHT, BOX_WIDTH, lay_out
from peftfx.pages.page import Page
from peftfx.sites.sites import Sites


class Read(HTMLParser):
    """The tags of a page, which must be closed, and the data of its script."""

    VOID = frozenset({"meta", "input", "rect", "path", "circle"})

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[dict[str, object]] = []
        self.text = ""
        self.feed(page.html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""
        if self.open[-1:] == ["script"] and data.startswith("["):
            self.data = json.loads(data)

    def paths(self) -> list[str]:
        """Every site that is drawn, with the layers' numbers put in."""
        found = []
        for site in self.data:
            numbers = site["n"]
            assert isinstance(numbers, list)
            found += [str(site["path"]).replace("*", str(n)) for n in numbers] or [str(site["path"])]
        return found


@pytest.mark.parametrize(
    "name", ["llama", "t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("blip2", "unet", "albert"))]
)
def test_every_site_is_drawn_once(captured: Callable[[str], Captured], name: str) -> None:
    sites = captured(name).graph.sites
    read = Read(sites.show())
    assert sorted(read.paths()) == sorted(site.path or "the model" for site in sites)
    boxes = [attrs for _, attrs in read.tags if attrs.get("role") == "button"]
    assert [int(str(box["data-i"])) for box in boxes] == list(range(len(read.data)))
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert not [attrs for _, attrs in read.tags if "src" in attrs or "href" in attrs], "it needs nothing else"


@pytest.mark.slow
def test_parts_stand_side_by_side(captured: Callable[[str], Captured]) -> None:
    heads = {
        name: re.findall(r'class="column"><h2>(.*?)<', captured(name).graph.sites.show().html)
        for name in ("t5", "blip2")
    }
    assert heads["t5"] == ["encoder", "decoder"]
    assert len(heads["blip2"]) == 3


def deep(captured: Callable[[str], Captured]) -> nn.Module:
    """LLaMA of 32 layers, without values."""
    small = captured("llama").model
    with torch.device("meta"):
        return type(small)(type(small.config)(**{**small.config.to_dict(), "num_hidden_layers": 32})).eval()


def test_equal_layers_are_drawn_once_and_what_differs_apart(captured: Callable[[str], Captured]) -> None:
    sites = captured("llama").graph.sites
    assert "× 2" in sites.show().html
    adapted = peftfx.transform(captured("llama").model, "lora(r=3)@mlp.down; lora(r=2)@layers.1.mlp.up_proj")
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_()
    page = adapted.show()
    adapted.remove()
    read = Read(page)
    assert "× 2" not in page.html
    by_path = {site["path"]: site for site in read.data}
    (told,) = by_path["model.layers.1.mlp.up_proj"]["adapters"]  # type: ignore[misc]
    assert told["what"] == "LoRA r=2"
    values = re.search(r"singular values of its update: (.*)", told["said"])
    assert values is not None
    assert len(values[1].split(", ")) == 2
    assert not by_path["model.layers.0.mlp.up_proj"]["adapters"]
    assert by_path["model.layers.0.mlp.down_proj"]["adapters"]


def test_equal_layers_inside_a_block_are_drawn_once() -> None:
    block = nn.ModuleDict({"layers": nn.Sequential(*(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in "123"))})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "end": nn.Linear(4, 2)})
    model.forward = lambda x: model["end"](block["layers"](x))  # type: ignore[method-assign]
    sites = peftfx.capture(model, {"x": torch.randn(2, 4)}).sites
    read = Read(sites.show())
    assert "× 3" in read.text
    assert "blocks.0.layers 0–2" in read.text
    assert sorted(read.paths()) == sorted(site.path for site in sites)


def test_boxes_do_not_overlap_and_lines_that_pass_one_row_have_lanes_of_their_own() -> None:
    boxes = [f"b{i}" for i in range(9)]
    chain = [(a, b) for a, b in itertools.pairwise(boxes)]
    far = [("b0", "b4"), ("b1", "b3"), ("b2", "b6"), ("b6", "b8")]
    laid = lay_out([*boxes, *(f"leaf{i}" for i in range(6))], ["sum"], [], [*chain, *far, ("b8", "sum")])
    places = [laid.places[name] for name in laid.places if name != "sum"]
    for (ax, ay), (bx, by) in itertools.combinations(places, 2):
        assert abs(ax - bx) >= BOX_WIDTH or abs(ay - by) >= BOX_HEIGHT
    assert all(BOX_WIDTH // 2 <= x <= laid.width - BOX_WIDTH // 2 for x, _ in places)
    lanes = {edge: int(line.split("C")[1].split()[0]) for edge, line in zip([*chain, *far], laid.lines, strict=False)}
    inside, across, outside, behind = (lanes[edge] for edge in (far[1], far[2], far[0], far[3]))
    assert inside < min(across, outside)
    assert across != outside
    assert behind == inside, "what passes other rows takes the first lane again"
    assert max(lanes.values()) < laid.width


def test_singular_values_are_those_of_the_update() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    adapted = peftfx.transform(model, "lora(r=2)@all-linear | head", inputs={"input": torch.randn(2, 6)})
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_()
    adapter = adapted.adapter("default")
    said = {p.site.path: adapter.params(p) for p in adapter.placements}
    read = {str(site["path"]): site for site in Read(adapted.show()).data}
    for path, p in said.items():
        want = torch.linalg.svdvals((4 * p["lora_B"] @ p["lora_A"]).detach())[:2]
        (told,) = read[path]["adapters"]  # type: ignore[misc]
        assert ", ".join(f"{float(v):.3g}" for v in want) in told["said"]


def test_names_are_no_markup_and_a_selection_is_refused() -> None:
    model = nn.Module()
    model.add_module("</script><b>&", nn.Linear(3, 3))
    model.forward = lambda x: next(iter(model.children()))(x)  # type: ignore[method-assign]
    sites = peftfx.inspect(model, inputs={"x": torch.randn(2, 3)})
    read = Read(sites.show("<i>"))
    assert read.paths() == ["</script><b>&"]
    assert not [tag for tag, _ in read.tags if tag in ("b", "i") and tag != "i"]
    assert sites._repr_html_() == sites.show()._repr_html_()
    assert Sites(sites.items)._repr_html_() is None
    with pytest.raises(PeftfxError, match="not known"):
        sites[:1].show()


def test_a_page_is_written_or_says_why_not(captured: Callable[[str], Captured], tmp_path: Path) -> None:
    page = captured("llama").graph.sites.show()
    assert page.save(tmp_path / "page.html").read_text(encoding="utf-8") == page.html
    with pytest.raises(PeftfxError, match="cannot write"):
        page.save(tmp_path / "nowhere" / "page.html")
    assert dataclasses.replace(page, title="x")._repr_html_().startswith("<iframe")


def test_how_far_a_merge_rounds_is_told_of_a_base_that_is_rounded() -> None:
    model = nn.Sequential(nn.Linear(6, 70), nn.ReLU(), nn.Linear(70, 4)).bfloat16().eval()
    adapted = peftfx.transform(model, "lora(r=2)@all-linear", inputs={"input": torch.randn(2, 6).bfloat16()})
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_()
    (told,) = {site["path"]: site for site in Read(adapted.show()).data}["0"]["adapters"]  # type: ignore[misc]
    found = re.search(r"a merge rounds to bfloat16 in 64 of its rows: (\S+) ", told["said"])
    assert found is not None
    layer = adapted.adapter("default")
    update = 4 * layer.get("0.lora_B").float() @ layer.get("0.lora_A").float()
    merged = (model[0].weight.float() + update)[:64]
    want = (merged.bfloat16().float() - merged).abs().max()
    assert float(found[1]) == pytest.approx(float(want), rel=0.05)


def dom(page: Path, tmp_path: Path, anchor: str = "") -> str:
    """The page as Chromium has it after its script ran."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    more = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [chromium, *flags, *more, "--disable-sync", f"{page.as_uri()}{anchor}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
@pytest.mark.parametrize(
    ("asked", "places"),
    [
        ("attention.query | attention.value", 64),
        ("mlp %26 ~up_proj", 64),
        ("q_proj", 32),
        ("/.*\\.3\\..*_proj/", 7),
    ],
)
def test_a_browser_searches_as_targets_do(
    captured: Callable[[str], Captured], tmp_path: Path, asked: str, places: int
) -> None:
    model = deep(captured)
    sites = peftfx.inspect(model, inputs={"input_ids": torch.zeros(1, 4, dtype=torch.long, device="meta")})
    page = sites.show().save(tmp_path / "page.html")
    assert page.stat().st_size < 100_000
    html = dom(page, tmp_path, f"#q={asked}&i=3")
    shown = re.search(r"<output[^>]*>(\d+) of (\d+) sites</output>", html)
    assert shown is not None
    assert int(shown[2]) == len(sites)
    assert int(shown[1]) == len(sites.select(asked.replace("%26", "&"))) == places
    assert 'aria-pressed="true"' in html
    assert "<dt>role</dt>" in html
