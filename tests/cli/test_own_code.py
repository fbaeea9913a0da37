"""A user's own modules and passes on the command line; and models that are fetched, where that is asked for."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from support.command import Inputs, Result, assert_refused

import peftfx as fx
from peftfx.patterns.pattern import forget

Command = Callable[..., Result]
RULES = """
from dataclasses import dataclass
from typing import ClassVar
import torch.nn.functional as F
import peftfx
from peftfx.passes import Pass, Probe, Rewrite

@peftfx.pattern("own.gelu", x="batch length width")
def own_gelu(x):
    return F.gelu(x)

@peftfx.pattern("own.silu", x="batch length width")
def own_silu(x):
    return F.silu(x)

TANH = Rewrite(own_gelu, lambda x: F.gelu(x, approximate="tanh"))
SEEN, NOWHERE, NONE = Probe(own_gelu), Probe(own_silu), 3

class Needs(Pass):
    def __init__(self, what):
        pass
    def __call__(self, graph):
        raise ZeroDivisionError

FAILS = Needs(1)

@peftfx.register
@dataclass(frozen=True, kw_only=True)
class OwnScale(peftfx.PatternMethod):
    peft_type: ClassVar[str] = "OWN_SCALE"
    pattern: ClassVar[peftfx.Pattern] = own_gelu

    def init(self, site, like, rng):
        return {"scale": like.new_ones(site.width)}

    def forward(self, site, x, y, p, training):
        return y * p["scale"]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of the user's."""
    (tmp_path / "my_rules.py").write_text(RULES, encoding="utf-8")
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_rules", None)
    forget(["own_gelu", "own_silu"])


def test_passes_run_on_what_is_exported(inputs: Inputs, peftfx: Command, here: Path) -> None:
    words = ("export", "--base", inputs.classifier, "--adapter", inputs.lora, "--output", here / "out")
    assert peftfx(*words, "--pass", "my_rules:SEEN", "--pass", "my_rules.py:TANH", "--quiet").code == 0
    report = json.loads((here / "out" / "peftfx_report.json").read_text(encoding="utf-8"))
    assert list(report["passes"].values()) == [2, 2]
    assert report["reference"].startswith("the graph behind Probe(pattern=own_gelu), Rewrite(pattern=own_gelu, by=...)")
    outputs = fx.runtime.load(here / "out")(input_ids=torch.tensor([[5, 6, 7, 8]]))
    assert [name for name in outputs if name.startswith("probe.")] == [
        f"probe.bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)
    ]
    assert peftfx(*words[:3], "--output", here / "probed", "--pass", "my_rules:SEEN", "--quiet").code == 0
    report = json.loads((here / "probed" / "peftfx_report.json").read_text(encoding="utf-8"))
    assert report["reference"] == "the model's own code; its graph, for Probe(pattern=own_gelu)"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("my_rules", "a pass is named as MODULE:NAME"),
        ("my_rules:TANG", "did you mean 'TANH'"),
        ("my_rules:ZZZ", "Needs"),
        ("my_rules:NONE", "NONE is a int, not a pass"),
        ("my_rules:Needs", "Needs needs options"),
        ("my_rules:FAILS", "Needs fails: ZeroDivisionError"),
        ("my_rules:NOWHERE", "the pass changes nothing in this model"),
        ("no_such_module:X", "No module named 'no_such_module'"),
        ("broken:X", "No module named 'nothing_of_the_kind'"),
    ],
)
def test_what_is_no_pass_is_told(named: str, said: str, inputs: Inputs, peftfx: Command, here: Path) -> None:
    words = ("export", "--base", inputs.encoder, "--output", here / "out", "--pass", named)
    assert_refused(peftfx(*words), said)
    assert not (here / "out").exists()


def test_a_dry_run_looks_for_the_passes(inputs: Inputs, peftfx: Command, here: Path) -> None:
    words = ("export", "--base", inputs.encoder, "--output", here / "out", "--dry-run", "--pass", "my_rules:TANG")
    assert_refused(peftfx(*words), "did you mean 'TANH'")


def test_a_module_brings_its_methods(inputs: Inputs, peftfx: Command, here: Path) -> None:
    words = ("inspect", inputs.encoder, "--rules", "own_scale")
    assert_refused(peftfx(*words[:-1], "of_nobody"), "unknown method 'of_nobody'", "--import MODULE")
    assert "own.gelu  2 sites" in peftfx(*words, "--import", "my_rules").out
    swappable = ("export", "--base", inputs.encoder, "--output", here / "out", "--swappable")
    assert_refused(peftfx(*swappable, "--pass", "my_rules:SEEN"), "passes run on a graph whose adapters are merged")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download asks."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        head, _, name = self.path.partition("?")[0].rpartition("/")
        if self.path.startswith("/api/models/org/name"):
            paths = list(self.folder.iterdir())
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"} for p in paths]
                self._send(json.dumps(tree).encode())
                return
            files = [{"rfilename": path.name} for path in paths]
            self._send(json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": files}).encode())
        elif head == f"/org/name/resolve/{'a' * 40}" and (self.folder / name).is_file():
            self._send((self.folder / name).read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_base_is_fetched_where_that_is_asked_for(
    inputs: Inputs, peftfx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.folder, Hub.asked = inputs.encoder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.chdir(tmp_path)
    words = ("inspect", "org/name", "--json", "--download")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(peftfx("inspect", "org/name", "--download"), "HF_HUB_OFFLINE switches the network off")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert_refused(peftfx("inspect", "org/name"), "pass --download to fetch it")
    assert Hub.asked == []
    found = peftfx(*words)
    assert json.loads(found.out) == json.loads(peftfx("inspect", inputs.encoder, "--json").out)
    assert any("model.safetensors" in path for path in Hub.asked)
    asked = len(Hub.asked)
    assert peftfx(*words).out == found.out
    assert len(Hub.asked) == asked, "what is in the cache is not asked for again"
    assert_refused(peftfx("inspect", "org/other", "--download"), "cannot download this model from the Hub")
    server.shutdown()
