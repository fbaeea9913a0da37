"""Two revisions of peftfx on the same work, in turn: an export, a swappable export, steps of decoding and of training.

    python benchmarks/before_and_after.py REV             # that revision against the working tree
    python benchmarks/before_and_after.py REV --pairs 9 --only export decode
    python benchmarks/before_and_after.py REV --only "export, decode" decode --experts 64 --steps 1500 --layers 4

Each piece of work is a process of its own, so that its CPU time and its peak of anonymous memory are told apart from
all else; the revisions take turns, and a ratio is the median over pairs: 1.0 within noise is the same speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from checkpoint import Size, add_size_options, size_of, write_checkpoint
from measure import Measured, measured, versions

ROOT = Path(__file__).resolve().parents[1]
SMALL = Size(layers=6, hidden=768, intermediate=2048, heads=12, kv_heads=4, vocabulary=16000)
START = """
import os, sys
import peftfx
assert peftfx.__file__.startswith(os.environ["PYTHONPATH"]), peftfx.__file__
"""
COMMAND = """
try:
    from peftfx.cli.main import main
except ImportError:
    from peftfx.cli import main
sys.argv[0] = "peftfx"
main()
"""
DECODE = """
import torch
torch.set_num_threads(1)
import peftfx.runtime
model = peftfx.runtime.load(sys.argv[1], threads=1)
ids = torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(0))
steps = int(sys.argv[2])
options = {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False}
model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
"""
TRAIN = """
import torch, transformers
torch.set_num_threads(1)
torch.manual_seed(0)
size = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=2000, **size))
adapted = peftfx.transform(model, peftfx.LoRA(r=8, target="attention | mlp")).train()
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
ids = torch.randint(2000, (4, 64))
for _ in range(60):
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def work(checkpoint: Path, made: Path, steps: int) -> Iterator[tuple[str, str, Sequence[object]]]:
    """Each piece of work: its name, its code, its arguments."""
    base, adapter = checkpoint / "base", checkpoint / "adapter"
    merged = ("export", "--base", base, "--adapter", adapter, "--merge", "--force", "--output", made / "merged")
    yield "export", COMMAND, (*merged, "--view", "forward")
    yield "export, decode view", COMMAND, (*merged[:-1], made / "decode", "--view", "decode")
    swappable = ("export", "--base", base, "--swappable", "--force", "--output", made / "graph")
    yield "swappable", COMMAND, swappable
    rows = ("export", "--base", base, "--batched", f"one={adapter}", "--force", "--output", made / "rows")
    yield "batched", COMMAND, rows
    yield f"decode, {steps} steps", DECODE, (made / "decode", steps)
    yield "train, 60 steps", TRAIN, ()


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of this repository")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="words with which the names of rows begin")
    parser.add_argument("--steps", type=int, default=96, help="of decoding, of two texts")
    add_size_options(parser, SMALL)
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_checkpoint(place / "checkpoint", size_of(args))
        trees = {"before": _tree(args.revision, place / "before"), "after": _tree(None, place / "after")}
        print("| | CPU, after / before | peak memory, after / before | CPU s before |\n| --- | --- | --- | --- |")
        for name, code, given in work(place / "checkpoint", place / "made", args.steps):
            if name.startswith(tuple(args.only)):
                print(_row(name, [_pair(trees, code, given) for _ in range(args.pairs)]), flush=True)
    print(", ".join(f"{package} {number}" for package, number in versions().items()))


def _tree(revision: str | None, place: Path) -> Path:
    """A revision's package in a directory of its own; None is the working tree."""
    place.mkdir()
    if revision is None:
        for folder in ("peftfx", "passes", "export"):
            shutil.copytree(ROOT / folder, place / folder, symlinks=True)
        return place
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", place], input=archive, check=True)
    return place


def _pair(trees: dict[str, Path], code: str, words: Sequence[object]) -> dict[str, Measured]:
    found = {}
    for name, tree in trees.items():
        os.environ["PYTHONPATH"] = str(tree)
        found[name] = measured([sys.executable, "-P", "-c", START + code, *map(str, words)])
    return found


def _row(name: str, pairs: list[dict[str, Measured]]) -> str:
    cpu = median(pair["after"].cpu / pair["before"].cpu for pair in pairs)
    memory = median(pair["after"].anonymous / pair["before"].anonymous for pair in pairs)
    before = median(pair["before"].cpu for pair in pairs)
    return f"| {name} | {cpu:.3f} | {memory:.3f} | {before:.1f} |"


if __name__ == "__main__":
    main()
