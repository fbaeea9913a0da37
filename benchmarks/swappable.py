"""What a graph for swappable adapters, and a file for it, take in memory and time, against the merged export.

    python benchmarks/checkpoint.py 1b                     # 4.4 GB
    python benchmarks/swappable.py 1b --output OUT         # 13 GB more; minutes

Each is one command in a process of its own; all views decode, all are verified.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import Measured, forget, measured, versions

_COMMAND = (sys.executable, "-c", "from peftfx.cli.main import main; main()")


def commands(source: Path, output: Path) -> Iterator[tuple[str, Sequence[object]]]:
    """The commands by what they make."""
    base, adapter, graph = source / "base", source / "adapter", output / "graph"
    export = ("export", "--base", base, "--view", "decode", "--output")
    yield "merged", (*export, output / "merged", "--adapter", adapter, "--merge")
    yield "swappable", (*export, graph, "--swappable")
    yield "an adapter's file", ("export-adapter", "--adapter", adapter, "--for", graph, "--output", output / "adapter")
    yield "batched", (*export, output / "batched", "--batched", f"x={adapter}")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="what checkpoint.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="of the rows")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    print("| | peak anonymous GB | CPU s, imports included | wall s | written GB |\n| --- | --- | --- | --- | --- |")
    for name, words in commands(args.source, args.output):
        if args.only is None or name in args.only:
            forget(args.source)
            print(row(name, measured([*_COMMAND, *map(str, words)])), flush=True)
    print(", ".join(f"{package} {number}" for package, number in versions().items()))


def row(name: str, taken: Measured) -> str:
    """A line of the table."""
    numbers = (f"{taken.anonymous / 1e9:.2f}", f"{taken.cpu:.0f}", f"{taken.wall:.0f}", f"{taken.written / 1e9:.2f}")
    return f"| {' | '.join((name, *numbers))} |"


if __name__ == "__main__":
    main()
