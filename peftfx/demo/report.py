"""The results of a demo, and the tables that show them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

APART_DIRECTORY = "onnx-apart"  #: the folder in the demo's directory to which the last suggested command writes


@dataclass(frozen=True)
class DemoResult:
    """The measurements of a demo.

    Attributes:
        output: the demo's directory.
        topics: the names of the classes.
        sentences: the number of training sentences and of held-out sentences.
        parameters: the number of trained parameters, and of all parameters.
        steps, seconds_per_step: the number of training steps, and the median time of a step.
        accuracy_before, accuracy_torch, accuracy_onnx: the accuracy on the held-out sentences: untrained, trained in
            torch, and merged in ONNX Runtime.
        max_abs: the largest difference of a logit between torch and ONNX Runtime.
        bytes: the bytes of weights and graph, by part of the output.
        latency_ms: the median milliseconds for one sentence in ONNX Runtime, by part of the output.
        examples: for each example the sentence, its topic by ONNX Runtime, the probability, and the right topic if
            known.
        seconds: the time of the whole demo.
    """

    output: Path
    topics: tuple[str, ...]
    sentences: tuple[int, int]
    parameters: tuple[int, int]
    steps: int
    seconds_per_step: float
    accuracy_before: float
    accuracy_torch: float
    accuracy_onnx: float
    max_abs: float
    bytes: dict[str, int]
    latency_ms: dict[str, float]
    examples: list[tuple[str, str, float, str]]
    seconds: float


def print_demo_report(result: DemoResult, console: Console) -> None:
    """Print ONNX Runtime's answers, the measurements, and the commands to try next."""
    console.print(_examples(result))
    console.print(_numbers(result))
    print_next(next_commands(result.output), console)


def print_next(commands: Iterable[str], console: Console) -> None:
    """Print commands to try next."""
    console.print("\nTry next:")
    for command in commands:
        console.print(f"  {escape(command)}", soft_wrap=True, highlight=False)


def next_commands(output: Path) -> tuple[str, ...]:
    """Return commands to try on the demo's results: where adapters can act, and the unmerged adapter."""
    base, adapter, apart = (shlex.quote(str(output / part)) for part in ("base", "adapter", APART_DIRECTORY))
    return (
        f"peftfx inspect {base}",
        f"peftfx export --base {base} --adapter {adapter} --no-merge --output {apart}",
    )


def _examples(result: DemoResult) -> Table:
    table = Table(title="What ONNX Runtime answers", title_justify="left")
    for column in ("sentence", "topic", "sure", "right"):
        table.add_column(column, no_wrap=column != "sentence")
    for text, topic, probability, right in result.examples:
        table.add_row(escape(text), topic, f"{probability:.0%}", right or "(not from the text)")
    return table


def _numbers(result: DemoResult) -> Table:
    trained, total = result.parameters
    size, latency = result.bytes, result.latency_ms
    table = Table(title=f"peftfx demo: {result.seconds:.0f} s in all", title_justify="left", show_header=False)
    train, held_out = result.sentences
    table.add_row("data", f"{train} sentences to train on, {held_out} held out, {len(result.topics)} topics")
    table.add_row("trained", f"{trained:,} of {total:,} parameters ({trained / total:.2%})")
    table.add_row("steps", f"{result.steps}, {1000 * result.seconds_per_step:.0f} ms each")
    table.add_section()
    table.add_row("held-out accuracy before", f"{result.accuracy_before:.1%} (chance: {1 / len(result.topics):.1%})")
    table.add_row("after, in torch", f"{result.accuracy_torch:.1%}")
    agreement = f"logits differ by {result.max_abs:.1e}"
    table.add_row("after, merged, in ONNX Runtime", f"{result.accuracy_onnx:.1%} ({agreement})")
    table.add_section()
    table.add_row("adapter", _megabytes(size["adapter"]))
    table.add_row("ONNX model, base | merged", f"{_megabytes(size['onnx-base'])} | {_megabytes(size['onnx'])}")
    table.add_row("one sentence, base | merged", f"{latency['onnx-base']:.1f} ms | {latency['onnx']:.1f} ms")
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
