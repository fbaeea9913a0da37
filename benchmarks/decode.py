"""Generating in ONNX Runtime: peftfx's decode graph beside ONNX Runtime GenAI's builder's and transformers' exporter's.

    python benchmarks/decode.py                       # 160M: minutes, 8 GB of memory, 5 GB of disk
    python benchmarks/decode.py --hidden 2048 --layers 22 --intermediate 5632 --heads 32 --kv-heads 4

Every graph is run as it is by ONNX Runtime on the CPU, on one thread, with the same tokens and the same cache, the
contenders in turn within each round; a figure is a contender's CPU time over that of GenAI's fp32 graph. Memory is
asked for in huge pages: in small ones, where the weights of a graph happen to lie makes 20% of a single token.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from checkpoint import Size, add_size_options, size_of, write_checkpoint
from measure import versions

SMALL = Size(layers=8, hidden=1024, intermediate=2816, heads=16, kv_heads=8)
#: What is run: batch, new tokens, tokens in the cache, rounds.
CALLS = {
    "8 x 1 token, past 128": (8, 1, 128, 21),
    "1 x 1 token, past 128": (1, 1, 128, 31),
    "4 x 128 tokens, no past": (4, 128, 0, 5),
    "1 x 64 tokens, past 64": (1, 64, 64, 9),
}


def peftfx(base: Path, output: Path, *words: str) -> Path:
    """`peftfx export` in the decode view, verified."""
    from peftfx.cli.main import app

    app(["export", "--base", str(base), "--view", "decode", "--output", str(output), *words], standalone_mode=False)
    return output / "model.onnx"


def genai(base: Path, output: Path, precision: str) -> Path:
    """ONNX Runtime GenAI's model builder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", base, "-o", output, "-e", "cpu"]
    words = [*map(str, command), "-p", precision, "-c", str(output.parent / "cache")]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return output / "model.onnx"


def transformers(base: Path, output: Path, *, multi_token: bool) -> Path:
    """transformers' exporter with its fusions for this provider: the graph that decodes."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokens, mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    exported = OnnxExporter().export_for_generation(
        model,
        {"input_ids": tokens, "attention_mask": mask},
        OnnxConfig(dynamic=True, ort_fusions="cpu"),
        multi_token_decode=multi_token,
    )
    exported.save_pretrained(output)
    return next(path for path in output.rglob("*.onnx") if "decode" in path.stem)


CONTENDERS: Mapping[str, Callable[[Path, Path], Path]] = {
    "peftfx": lambda base, out: peftfx(base, out),
    "peftfx --optimize none": lambda base, out: peftfx(base, out, "--optimize", "none"),
    "transformers, many tokens": lambda base, out: transformers(base, out, multi_token=True),
    "transformers, one token": lambda base, out: transformers(base, out, multi_token=False),
    "peftfx --quantize int4": lambda base, out: peftfx(base, out, "--quantize", "int4"),
    "genai int4": lambda base, out: genai(base, out, "int4"),
    "genai": lambda base, out: genai(base, out, "fp32"),
}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  #: glibc's malloc, where the kernel has such pages
LOADS = 4  #: how often a graph is opened in each of two orders
NEEDS = {"genai": "onnxruntime_genai"}


def session(path: Path) -> ort.InferenceSession:
    """One thread, so that CPU time is a graph's own and not of threads that wait."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feed(run: ort.InferenceSession, size: Size, batch: int, tokens: int, past: int) -> dict[str, np.ndarray]:
    """The same values for every contender, whatever it calls its inputs."""
    made: dict[str, np.ndarray] = {}
    cache = (batch, size.kv_heads, past, size.hidden // size.heads)
    for spec in run.get_inputs():
        random = np.random.default_rng(zlib.crc32(spec.name.encode()))
        if "mask" in spec.name:
            made[spec.name] = np.ones((batch, past + tokens), bool if "bool" in spec.type else np.int64)
        elif "position" in spec.name:
            made[spec.name] = np.tile(np.arange(past, past + tokens), (batch, 1))
        elif "int64" in spec.type:
            made[spec.name] = random.integers(3, 200, (batch, tokens))
        else:
            made[spec.name] = random.standard_normal(cache, np.float32)
    return made


def compare(graphs: Mapping[str, Path], size: Size) -> dict[str, dict[str, float]]:
    """CPU seconds of loading and of each call, and bytes, by contender.

    Calls are the mean of two processes, of which the second loads and runs the contenders in the other order; loading
    is the median of processes that do nothing else.
    """
    orders = [list(graphs), list(graphs)[::-1]]
    what = [{"graphs": {name: str(graphs[name]) for name in order}, "size": vars(size)} for order in orders]
    calls = [apart("--measure", json.dumps(w), HUGE_PAGES) for w in what]
    loads = [{name: apart("--load", str(graphs[name])) for name in order} for order in orders * LOADS]
    results = {}
    for name, path in graphs.items():
        results[name] = {"load": statistics.median(times[name] for times in loads)}
        results[name] |= {call: statistics.mean(c[name][call] for c in calls) for call in CALLS}
        results[name]["size"] = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.onnx*"))
    return results


def apart(option: str, what: str, environment: Mapping[str, str] | None = None) -> Any:
    """What this program prints with an option, in a process of its own."""
    command = [sys.executable, __file__, option, what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {}))
    return json.loads(done.stdout)


def load(path: Path) -> float:
    """CPU seconds of opening a graph."""
    start = time.process_time()
    session(path)
    return time.process_time() - start


def measure(graphs: Mapping[str, Path], size: Size) -> dict[str, dict[str, float]]:
    """The median of CPU seconds of each call."""
    sessions = {name: session(path) for name, path in graphs.items()}
    results: dict[str, dict[str, float]] = {name: {} for name in graphs}
    for call, (batch, tokens, past, rounds) in CALLS.items():
        feeds = {name: feed(run, size, batch, tokens, past) for name, run in sessions.items()}
        spent: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(rounds + 1):
            for name in list(feeds)[:: 1 if turn % 2 else -1]:
                start = time.process_time()
                try:
                    sessions[name].run(None, feeds[name])
                except Exception as error:
                    print(f"{name}: {call}: {str(error)[:200]}", file=sys.stderr)
                    del feeds[name]
                    continue
                if turn:  # the first one warms up
                    spent[name].append(time.process_time() - start)
        for name, times in spent.items():
            results[name][call] = statistics.median(times) if times else float("nan")
    return results


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Ratios to the last contender, with its own figures in a last line."""
    *_, (reference, of) = results.items()
    rows = [["", *of], ["---"] * (len(of) + 1)]
    for name, values in results.items():
        rows.append([name, *(f"{values[key] / of[key]:.2f}" for key in of)])
    figures = [f"{v / 1e6:.0f} MB" if key == "size" else f"{v * 1e3:.1f} ms" for key, v in of.items()]
    rows.append([f"({reference})", *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, SMALL)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--make", nargs=3, metavar=("NAME", "BASE", "OUTPUT"), help="export, and no more")
    parser.add_argument("--measure", type=json.loads, metavar="JSON", help="measure the calls of graphs, and no more")
    parser.add_argument("--load", type=Path, metavar="GRAPH", help="measure how long one takes to open, and no more")
    options = parser.parse_args(arguments)
    if options.measure:
        graphs = {name: Path(path) for name, path in options.measure["graphs"].items()}
        print(json.dumps(measure(graphs, Size(**options.measure["size"]))))
        return
    if options.load:
        print(load(options.load))
        return
    if options.make:
        name, base, output = options.make
        print(CONTENDERS[name](Path(base), Path(output)))
        return
    size = size_of(options)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_checkpoint(work / "model", size)
        write_tokenizer(work / "model" / "base")
        graphs = {}
        for name in (name for name in CONTENDERS if name in options.only):
            if (needed := NEEDS.get(name.split()[0])) and importlib.util.find_spec(needed) is None:
                print(f"{name}: skipped, {needed} is not installed", file=sys.stderr)
                continue
            graphs[name] = made_apart(name, work / "model" / "base", work / name)
        results = compare(graphs, size)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps({"size": vars(size), "versions": versions(), "results": results}, indent=2))


def made_apart(name: str, base: Path, output: Path) -> Path:
    """A contender's graph, exported by a process of its own, whose last line says where it is."""
    command = [sys.executable, __file__, "--make", name, str(base), str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(done.stdout.splitlines()[-1])


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of words without meaning: GenAI's builder wants one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 1, "</s>": 2, "<unk>": 0}
    fast = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


if __name__ == "__main__":
    main()
