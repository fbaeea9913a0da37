"""The ways from a base and a LoRA to one merged ONNX model that `export.py` compares; run by it, one to a process.

    python benchmarks/contenders.py NAME BASE ADAPTER OUTPUT [--modules FILE]

Modules named in FILE are imported first, and are not counted as work; `--list` writes what a run imported instead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from measure import ready

Contender = Callable[[Path, Path, Path], object]


def peftfx(base: Path, adapter: Path, output: Path) -> None:
    """`peftfx export --merge`, verification included."""
    from peftfx.cli.main import app

    words = ["export", "--base", base, "--adapter", adapter, "--merge", "--view", "forward", "--output", output]
    app([str(word) for word in words], standalone_mode=False)


def peft_and_torch(base: Path, adapter: Path, output: Path) -> None:
    """PEFT merges, `torch.onnx.export(dynamo=True)` exports; nothing is verified."""
    import torch

    model = _merged(base, adapter)
    tokens, dynamic = torch.ones(2, 7, dtype=torch.long), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    output.mkdir()
    torch.onnx.export(
        model,  # type: ignore[arg-type]
        kwargs={"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        f=output / "model.onnx",
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
        external_data=True,
        dynamo=True,
    )


def peft_and_transformers(base: Path, adapter: Path, output: Path) -> None:
    """PEFT merges, `transformers.exporters.OnnxExporter` exports; nothing is verified."""
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = _merged(base, adapter)
    tokens = torch.ones(2, 7, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True)).save_pretrained(output)


def cp(base: Path, adapter: Path, output: Path) -> None:
    """`cp` of another's output, and `sync`: what the disk takes, without any arithmetic."""
    subprocess.run(["cp", "-r", base, output], check=True)
    subprocess.run(["sync", *map(str, output.iterdir())], check=True)


def _merged(base: Path, adapter: Path) -> object:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    merged.config.use_cache = False
    return merged


CONTENDERS: dict[str, tuple[Contender, tuple[str, ...]]] = {
    "peftfx": (peftfx, ("peftfx",)),
    "PEFT + torch.onnx": (peft_and_torch, ("peft", "onnxscript")),
    "PEFT + transformers.exporters": (peft_and_transformers, ("peft", "transformers.exporters")),
    "cp": (cp, ()),
}
"""Each with the packages that it needs."""


def main() -> None:
    """Run one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(CONTENDERS))
    for name in ("base", "adapter", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--modules", type=Path)
    parser.add_argument("--list", type=Path)
    args = parser.parse_args()
    run, needs = CONTENDERS[args.name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.name == "peftfx":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as its command does, before torch is imported
    for module in needs if args.modules is None else json.loads(args.modules.read_text()):
        with suppress(Exception):  # some modules can only be imported by those that they belong to
            importlib.import_module(module)
    if args.name != "cp":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    ready()
    run(args.base, args.adapter, args.output)
    if args.list is not None:
        args.list.write_text(json.dumps([n for n in sys.modules if n != "__main__"]))


if __name__ == "__main__":
    main()
