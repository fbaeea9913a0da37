"""Pages of models of the zoo's kinds, from configs alone: bytes, CPU seconds, and pictures by a headless Chromium.

Pictures are wide and light, wide and dark, and narrow, with one site chosen; of 128 colours where Pillow is there.

python benchmarks/pictures.py FOLDER [NAME...]
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import transformers as hf
from torch import Tensor

import peftfx
from peftfx.cli.directories import page_directory
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


STABLE_DIFFUSION: dict[str, object] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  #: what version 1.5 has other than diffusers' own defaults
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
    "unet": (STABLE_DIFFUSION, "UNet2DConditionModel", "lora(r=8)@attention"),
}
CHROMIUM = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update"),
]
CHOSEN = 4  #: the number of the site that is chosen
COLOURS = 128


def picture(page: Path, made: Path, *, width: int, dark: bool) -> None:
    """A page as Chromium shows it, if there is one."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return
    more = ["--blink-settings=preferredColorScheme=0"] if dark else []
    with tempfile.TemporaryDirectory() as profile:
        flags = [*CHROMIUM, *more, f"--user-data-dir={profile}", f"--window-size={width},900", f"--screenshot={made}"]
        subprocess.run([chromium, *flags, f"{page.as_uri()}#i={CHOSEN}"], capture_output=True, timeout=120, check=True)
    with contextlib.suppress(ImportError):
        from PIL import Image

        Image.open(made).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(made, optimize=True)


def main(folder: Path, names: list[str]) -> None:
    """Make the pages, and tell of each."""
    for name in names or MODELS:
        config, kind, rules = MODELS[name]
        base = folder / name
        base.mkdir(parents=True, exist_ok=True)
        told = config if isinstance(config, dict) else {**config.to_dict(), "architectures": [kind]}
        (base / "config.json").write_text(json.dumps(told), encoding="utf-8")
        start = time.process_time()
        made = page_directory(base, rules=rules)
        taken = time.process_time() - start
        page = (folder / f"{name}.html").resolve()
        made.save(page)
        print(f"{name}: {page.stat().st_size:,} bytes, {taken:.1f} CPU s", flush=True)
        across = 1500 if name in ("blip2", "unet") else 1200
        for what, width, dark in (("wide", across, False), ("dark", across, True), ("narrow", 420, False)):
            picture(page, folder / f"{name}-{what}.png", width=width, dark=dark)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
