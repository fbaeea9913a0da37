"""Types each command, and writes what it says to `docs/commands.md`: `python tests/commands_page.py [--demo]`.

The commands run one after another in one new directory, in this process. `--demo` runs `peftfx demo` too, which takes
minutes; without it the page keeps what it has of the demo.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from support.words import word_tokenizer

from peftfx.cli.main import main

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
_HEAD = """# Each command, as typed

`python tests/commands_page.py` types these commands, one after another in one directory, `/models`, and writes this
page. A test types them again, and compares all but the numbers. The base is a LLaMA of one layer, tiny and random;
`...` stands for lines that are left out. [The command line](using-commands.md) says what the commands are for.
"""
_WORDS = ["<unk>", "<pad>", "</s>", "one", "two", "three", "red", "blue", "green", "is"]
_CUT, _FOLDER = "...", "/models"  #: lines that are left out; how the page calls the working directory


@dataclass(frozen=True)
class Step:
    """A command, and what it does.

    Attributes:
        line: as it is typed.
        about: a sentence ahead of it.
        code: its exit code.
        most: lines of what it says that are shown.
        varies: whether what it says is not the same on every machine: the words of a random model.
        slow: whether it takes minutes.
    """

    line: str
    about: str
    code: int = 0
    most: int = 20
    varies: bool = False
    slow: bool = False

    @property
    def words(self) -> list[str]:
        """The words of the line, without the program's name."""
        return shlex.split(self.line)[1:]


CHAPTERS: dict[str, tuple[Step, ...]] = {
    "Look at a model": (
        Step("peftfx info base", "What a directory holds."),
        Step(
            "peftfx inspect base --target 'attention.query | mlp.down'",
            "Where adapters can act, and what a target picks.",
        ),
        Step(
            "peftfx inspect base --rules 'lora(r=4)@attention; prefix_tuning(num_virtual_tokens=8)'",
            "The plan: what rules would do.",
        ),
        Step("peftfx inspect base --network", "What reads what, as JSON.", most=8),
        Step(
            "peftfx inspect base --rules 'lora(r=4)@attention' --html page.html", "The same as a [page](pictures.md)."
        ),
        Step("peftfx methods", "What a rule can say.", most=6),
        Step("peftfx methods ia3", "The options of one method.", most=5),
    ),
    "Train": (
        Step(
            "peftfx train --base base --data rows.jsonl --rules 'lora(r=4)@attention' --output monday --steps 4",
            "An adapter from a file of rows.",
        ),
        Step(
            "peftfx train --base base --data rows.jsonl --evaluate held.jsonl --rules 'lora(r=4)@attention' "
            "--output friday --steps 8 --seed 1",
            "Another, with the loss on rows that it does not learn.",
        ),
        Step("peftfx info monday", "What an adapter is."),
        Step("peftfx diff monday friday", "What two adapters differ in; the exit code is 1.", code=1, most=6),
    ),
    "Export": (
        Step(
            "peftfx export --base base --adapter monday --output onnx --dry-run",
            "What would be written, in seconds.",
        ),
        Step(
            "peftfx export --base base --adapter monday --output onnx", "The model with its adapter, checked.", most=40
        ),
        Step(
            "peftfx export --base base --adapter friday --quantize int8 --output int8 --quiet",
            "Another, in eight bits, quietly.",
        ),
        Step("peftfx info onnx", "What an export is."),
        Step("peftfx diff onnx int8", "What two exports differ in.", code=1, most=8),
        Step("peftfx report onnx int8 --html report.html", "Both as a page, side by side."),
        Step("peftfx run onnx --prompt 'two is' --max-new-tokens 3", "The model continues a text.", varies=True),
    ),
    "Many adapters on one graph": (
        Step(
            "peftfx export --base base --swappable --slots attention --output graph --quiet",
            "A base with places for adapters.",
        ),
        Step("peftfx export-adapter --adapter monday --for graph --output monday", "An adapter for it."),
        Step("peftfx info monday.onnx_adapter", "What the file is."),
        Step(
            "peftfx run graph --adapter monday.onnx_adapter --prompt 'two is' --max-new-tokens 3",
            "The base with the adapter.",
            varies=True,
        ),
    ),
    "Merge and convert": (
        Step(
            "peftfx merge --base base --adapter monday --output merged",
            "The base with the adapter in its weights, for torch and others.",
        ),
        Step(
            "peftfx convert --base base --tuned merged --rank 4 --output difference",
            "The difference of two checkpoints as a LoRA.",
        ),
        Step("peftfx diff base merged", "Two bases are no adapters and no exports.", code=2),
    ),
    "How commands speak": (
        Step("peftfx info monday --json", "For programs.", most=8),
        Step("peftfx methods ia3 --quiet", "Nothing but warnings and errors."),
        Step("peftfx info tuesday", "An error says what is wrong, where, and what to do.", code=2),
        Step("peftfx info tuesday --json", "The same for programs.", code=2),
        Step("peftfx export --base base --output onnx --view decod", "A word that is not known.", code=2),
        Step("peftfx export --base base --output onnx", "What is there is not written over.", code=2),
    ),
    "The whole way": (
        Step("peftfx demo", "A real encoder and real text, offline, in minutes.", most=60, varies=True, slow=True),
    ),
}


def steps(*, slow: bool = False) -> Iterator[Step]:
    """All of them, in order; those that take minutes if they are asked for."""
    return (step for step in itertools.chain(*CHAPTERS.values()) if slow or not step.slow)


def write_inputs(folder: Path) -> None:
    """The directory that the commands are typed in: a base with a tokenizer, and rows."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=len(_WORDS), **size, pad_token_id=1, bos_token_id=None, eos_token_id=2)
    hf.LlamaForCausalLM(config).save_pretrained(folder / "base")
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    word_tokenizer(_WORDS, **names).save_pretrained(folder / "base")
    rows = [{"prompt": f"{number} is", "completion": colour} for number, colour in zip(_WORDS[3:6], _WORDS[6:9])]
    for name, own in (("rows", rows * 4), ("held", rows)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")


def typed(step: Step) -> str:
    """What a command says in the working directory, on both of its streams, as a terminal shows it.

    Raises:
        AssertionError: it ends with another exit code.
    """
    said = io.StringIO()
    before = sys.argv
    sys.argv = ["peftfx", *step.words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = _run()
    finally:
        sys.argv = before
    assert code == step.code, f"{step.line}: exit code {code}\n{said.getvalue()}"
    return said.getvalue().replace(str(Path.cwd()), _FOLDER)


def _run() -> int:
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def shown(step: Step, said: str) -> str:
    """A command and what it said, as the page has it."""
    lines = [line.rstrip() for line in said.rstrip().splitlines()]
    lines = [*lines[: step.most], _CUT] if len(lines) > step.most else lines
    return "\n".join(f"    {line}".rstrip() for line in (f"$ {step.line}", *lines))


def stable(text: str) -> list[str]:
    """The lines of a text that are the same on every machine: numbers, and so the widths of tables, are left out."""
    found = []
    for line in text.splitlines():
        words = re.sub(r"(\d)\+\w+", r"\1", line)  # torch of a CPU, or of CUDA
        words = re.sub(r"-?\d[\d.,]*(e[+-]?\d+)?", "#", words)
        words = re.sub(r"[─━]+", "─", re.sub(r"\s+", " ", words)).strip()
        found.append(words)
    return found


def on_page(step: Step, page: str) -> str:
    """What the page has of a command, and nothing where it has none."""
    head = f"    $ {step.line}"
    _, found, after = page.partition(f"{head}\n")
    block = itertools.takewhile(lambda line: line.startswith("    ") or not line, after.splitlines())
    own = itertools.takewhile(lambda line: not line.startswith("    $ "), block)
    return "\n".join([head, *own]).rstrip() if found else ""


def written(said: dict[str, str], before: str) -> str:
    """The page; of a command that was not typed it keeps what it had.

    Args:
        said: by the line that was typed.
        before: the page as it was.
    """
    parts = [_HEAD]
    for chapter, own in CHAPTERS.items():
        blocks = (shown(step, said[step.line]) if step.line in said else on_page(step, before) for step in own)
        parts += [f"## {chapter}", *(f"{step.about}\n\n{block}" for step, block in zip(own, blocks, strict=True))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def run(folder: Path, *, slow: bool = False) -> dict[str, str]:
    """What each command says in a new directory, by its line."""
    write_inputs(folder)
    with contextlib.chdir(folder):
        return {step.line: typed(step) for step in steps(slow=slow)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="run `peftfx demo` too")
    os.environ["COLUMNS"] = "120"
    with tempfile.TemporaryDirectory() as made:
        told = run(Path(made), slow=parser.parse_args().demo)
    PAGE.write_text(written(told, PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""), encoding="utf-8")
