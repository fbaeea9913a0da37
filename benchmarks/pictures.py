"""Pages of models of the zoo's kinds, from their configs alone: bytes, seconds, and pictures by a headless Chromium.

python benchmarks/pictures.py FOLDER [NAME...]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import transformers as hf
from torch import Tensor

import peftfx
from peftfx.export.command import page_directory
from peftfx.sites.site import PatternSite


@peftfx.pattern("mlp.swiglu", x="batch length width", gate="inner width", up="inner width", down="width inner")
def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The feed-forward of LLaMA."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@peftfx.register
class Louder(peftfx.PatternMethod):
    """A scale of what a feed-forward gives."""

    peft_type = "LOUDER"
    pattern = swiglu

    def init(self, site: PatternSite, like: Tensor, rng: Any) -> dict[str, Tensor]:
        """Ones."""
        return {"scale": like.new_ones(site.width)}

    def forward(self, site: PatternSite, x: Tensor, y: Tensor, p: peftfx.method.Params, training: bool) -> Tensor:
        """The value, scaled."""
        return y * p["scale"]


MODELS: dict[str, tuple[Any, str, str]] = {
    "llama": (
        hf.LlamaConfig(),
        "LlamaForCausalLM",
        "lora(r=8)@attention; louder; prefix_tuning(num_virtual_tokens=8)",
    ),
    "mixtral": (hf.MixtralConfig(), "MixtralForCausalLM", "lora(r=8)@attention | experts"),
    "bert": (hf.BertConfig(), "BertForSequenceClassification", "lora(r=8)@attention; bitfit@mlp"),
    "t5": (hf.T5Config(), "T5ForConditionalGeneration", "lora(r=8)@attention"),
    "blip2": (hf.Blip2Config(image_token_index=50265), "Blip2ForConditionalGeneration", "lora(r=8)@attention"),
}
CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"]


def picture(page: Path, made: Path, *, width: int, dark: bool) -> None:
    """A page as Chromium shows it, if there is one."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is not None:
        more = ["--blink-settings=preferredColorScheme=0"] if dark else []
        flags = [*CHROMIUM, *more, f"--window-size={width},900", f"--screenshot={made}"]
        subprocess.run([chromium, *flags, page.as_uri()], capture_output=True, timeout=120, check=True)


def main(folder: Path, names: list[str]) -> None:
    """Make the pages, and tell of each."""
    for name in names or MODELS:
        config, kind, rules = MODELS[name]
        base = folder / name
        base.mkdir(parents=True, exist_ok=True)
        (base / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": [kind]}), encoding="utf-8")
        start = time.perf_counter()
        made = page_directory(base, rules=rules)
        captured = time.perf_counter() - start
        page = (folder / f"{name}.html").resolve()
        made.save(page)
        print(f"{name}: {page.stat().st_size:,} bytes, {captured:.1f} s", flush=True)
        for what, width, dark in (("wide", 1200, False), ("dark", 1200, True), ("narrow", 420, False)):
            picture(page, folder / f"{name}-{what}.png", width=width, dark=dark)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
