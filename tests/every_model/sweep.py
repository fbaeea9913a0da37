"""Checks, each in a fork of its own with limits on time and memory; what came of them is kept as it comes."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import os
import resource
import select
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from every_model.checks import SEEING, TASKS, Result, check, model_types

RESULTS = Path(__file__).with_name("results.csv")
SECONDS = 120  #: of CPU time
MEMORY = 8 << 30  #: of a check's address space beyond what the process has already
_DECODED = ("text-generation", "text2text-generation", "speech-to-text", SEEING)

Key = tuple[str, str, str]  #: task, view, model type


def keys() -> Iterator[Key]:
    """Every check: forward views of all, and decode views of what generates text."""
    for view in ("forward", "decode"):
        for task in TASKS:
            if view == "forward" or task in _DECODED:
                yield from ((task, view, model_type) for model_type in model_types(task))


def read() -> dict[Key, Result]:
    """What is known."""
    if not RESULTS.is_file():
        return {}
    with open(RESULTS, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["task"], row["view"], row["model"]): Result(row["status"], row["note"]) for row in rows}


def write(results: Mapping[Key, Result]) -> None:
    """Keep it, in the order of `keys`."""
    with open(RESULTS, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["task", "view", "model", "status", "note"])
        for key in (k for k in keys() if k in results):
            out.writerow([*key, *dataclasses.astuple(results[key])])


def run(chosen: list[Key]) -> Iterator[tuple[Key, Result]]:
    """Run checks one after the other and keep what comes of each."""
    results = read()
    gc.freeze()  # so that a collection in a fork does not touch, and copy, every page
    for key in chosen:
        results[key] = attempt(key)
        write(results)
        yield key, results[key]


def attempt(key: Key) -> Result:
    """One check, in a fork."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        _child(key, sink)
    os.close(sink)
    said, until = b"", time.monotonic() + 4 * SECONDS
    while True:
        ready, _, _ = select.select([source], [], [], max(0.0, until - time.monotonic()))
        piece = os.read(source, 1 << 16) if ready else b""
        said += piece
        if not piece:
            break
    os.close(source)
    if not said:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said:
        return Result(**json.loads(said))
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return Result("crashed", f"more than {SECONDS} seconds")
    return Result("crashed", f"the process ended with {status}")


def _child(key: Key, sink: int) -> None:
    task, view, model_type = key
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    try:
        result = check(task, model_type, view)
    except BaseException as error:
        result = Result("crashed", f"{type(error).__name__}: {error}".partition("\n")[0][:300])
    os.write(sink, json.dumps(dataclasses.asdict(result)).encode())
    os._exit(0)
