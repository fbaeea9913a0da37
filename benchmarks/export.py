"""A base and a LoRA to one merged ONNX model: what peftfx takes, against its peers and against `cp`.

    python benchmarks/export.py            # 1.1B in fp32: minutes, 12 GB of memory, 20 GB of disk
    python benchmarks/export.py --only peftfx cp --layers 32 --hidden 4096 --intermediate 11008 --kv-heads 32
    python benchmarks/export.py --plot docs/export.png --json export.json

Each runs in a process of its own, its inputs not in the page cache. CPU seconds are beyond imports: of what a
tiny export of the same kind had loaded at its end. `cp` copies peftfx's output: the least that a disk takes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from checkpoint import DTYPES, Size, add_size_options, size_of, write_checkpoint
from contenders import CONTENDERS
from measure import Measured, forget, measured, versions

RUN = Path(__file__).with_name("contenders.py")
TINY = Size(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=300)


def compare(checkpoint: Path, names: Sequence[str], work: Path) -> dict[str, Measured]:
    """Run each contender that can be run on the checkpoint, the first one's output being what `cp` copies.

    Args:
        checkpoint: a directory with `base` and `adapter`.
        names: of contenders, in the order they run.
        work: a directory for what they write; it is emptied after each.
    """
    write_checkpoint(work / "tiny", TINY)
    results: dict[str, Measured] = {}
    copied: Path | None = None
    for name in names:
        lacking = [p for p in CONTENDERS[name][1] if importlib.util.find_spec(p) is None]
        if lacking or (name == "cp" and copied is None):
            print(f"{name}: skipped, {', '.join(lacking) or 'there is nothing to copy'}", file=sys.stderr)
            continue
        output, modules = work / "out", work / "modules.json"
        source = checkpoint / "base" if copied is None or name != "cp" else copied
        command = [sys.executable, str(RUN), name, str(source), str(checkpoint / "adapter"), str(output)]
        if name != "cp":
            tiny = [str(work / "tiny" / part) for part in ("base", "adapter")]
            listing = [sys.executable, str(RUN), name, *tiny, str(work / "tiny out"), "--list", str(modules)]
            subprocess.run(listing, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            shutil.rmtree(work / "tiny out")
            command += ["--modules", str(modules)]
        forget(source)
        results[name] = measured(command)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
        if copied is None:
            copied = output.rename(work / "copied")
        else:
            shutil.rmtree(output)
    if copied is not None:
        shutil.rmtree(copied)
    return results


def rows(results: Mapping[str, Measured]) -> list[list[str]]:
    """Of the table: numbers, and how many times the first contender's they are."""
    first = next(iter(results.values()))
    table = []
    for name, r in results.items():
        times = [(r.wall, first.wall), (r.work_cpu, first.work_cpu), (r.anonymous, first.anonymous)]
        # `cp` does no work of its own: the kernel does it, and it has no imports.
        ratios = [f"{a / b:.1f}" if b else "" for a, b in times]
        table.append(
            [
                *(name, f"{r.wall:.1f}", ratios[0], f"{r.work_cpu:.1f}", ratios[1]),
                *(f"{r.anonymous / 1e9:.2f}", ratios[2], f"{r.written / 1e9:.2f}", f"{r.imports_cpu:.1f}"),
            ]
        )
    return table


HEADS = ("", "wall s", "x", "CPU s", "x", "anonymous GB", "x", "written GB", "imports, CPU s")


def plot(results: Mapping[str, Measured], path: Path, title: str) -> None:
    """Bars: wall, CPU and anonymous memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.6 * len(results) + 1.6), sharey=True)
    kinds = {"wall, s": "wall", "CPU beyond imports, s": "work_cpu", "peak anonymous memory, GB": "anonymous"}
    names = list(results)[::-1]
    for axis, (label, field) in zip(axes, kinds.items(), strict=True):
        values = [getattr(results[n], field) / (1e9 if field == "anonymous" else 1) for n in names]
        bars = axis.barh(names, values, color=["#2a6f97" if n == "peftfx" else "#b0b7bd" for n in names])
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make the checkpoint, run the contenders, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the base")
    parser.add_argument("--checkpoint", type=Path, help="made already, by checkpoint.py")
    parser.add_argument("--work", type=Path, help="a directory on the disk to measure; by default the system's own")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    add_size_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as made:
        work = Path(made)
        if args.checkpoint is None:
            write_checkpoint(work / "checkpoint", size_of(args), args.dtype)
        results = compare(args.checkpoint or work / "checkpoint", args.only, work)
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADS, title=f"{args.layers} layers of {args.hidden}, {args.dtype}, LoRA r=8 on all linear layers")
    for row in rows(results):
        table.add_row(*row)
    Console(width=120).print(table)
    print(", ".join(f"{n} {v}" for n, v in versions().items()))
    if args.plot is not None:
        plot(
            results, args.plot, f"A LLaMA of {args.layers} layers, hidden size {args.hidden}, LoRA merged and exported"
        )
    if args.json is not None:
        args.json.write_text(json.dumps({n: asdict(r) for n, r in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
