"""Attempts: the real command in forks of one process that has imported everything, so that a run costs no start.

The process is started by `Attempts`; it runs one thread and no ONNX Runtime session, without which a fork is not safe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

CANNOT_MOUNT = 77  #: exit code of a run that wanted a small disk and may not mount one
PATIENCE = 300  #: seconds on the clock until a run that does not end is killed


@dataclass(frozen=True)
class Attempt:
    """How one run ended.

    Attributes:
        code: the exit code; minus the signal where one ended it.
        err: what it wrote to stderr.
        seconds: CPU time of its first thread: what it did until it ended, however busy the machine is.
    """

    code: int
    err: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL


class Attempts:
    """The client: `run` runs `peftfx WORDS` in a fork of a server."""

    def __init__(self, *warm_up: object) -> None:
        """Start the server; `warm_up` is a command whose imports all the others find done."""
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self._ask({"words": [str(w) for w in warm_up], "imports": True})

    def run(self, *words: object, kill_after: float | None = None, setup: str = "", option: object = None) -> Attempt:
        """Run a command in a fork.

        Args:
            words: of the command.
            kill_after: seconds, as those of an Attempt, after which SIGKILL is sent.
            setup: a function of this module that the fork first calls with `option`.
        """
        return self._ask({"words": [str(w) for w in words], "kill_after": kill_after, "setup": setup, "option": option})

    def _ask(self, request: dict[str, object]) -> Attempt:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Attempt(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(10)


@contextlib.contextmanager
def attempts(*warm_up: object) -> Iterator[Attempts]:
    """A server for as long as the block lasts."""
    made = Attempts(*warm_up)
    try:
        yield made
    finally:
        made.close()


def limit_files(nbytes: int) -> None:
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def small_disk(option: list[object]) -> None:
    """Mount a file system of so many bytes on a directory, seen by this run alone; it is copied out before the end."""
    size, directory, copy = int(str(option[0])), Path(str(option[1])), Path(str(option[2]))
    libc = __import__("ctypes").CDLL(None, use_errno=True)
    private, namespace = 1 << 18 | 1 << 14, 0x20000
    if libc.unshare(namespace) or libc.mount(b"none", b"/", None, private, None):
        os._exit(CANNOT_MOUNT)
    if libc.mount(b"none", str(directory).encode(), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(CANNOT_MOUNT)
    AT_EXIT.append(lambda: shutil.copytree(directory, copy))


def out_of_memory(stage: str) -> None:
    """From the moment this stage is announced, no memory can be had beyond what the process has, and a little."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        little = (3 if stage == "write" else 4) << 20  # the buffer of a written file is 4 MB
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + little, resource.RLIM_INFINITY))
        AT_EXIT.append(lambda: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))

    _when(stage, limit)


def not_a_byte(output: str) -> None:
    """Write a directory until no memory is left, not even the little that Python keeps for small objects."""
    from peftfx.export.writing.atomic_directory import publish

    held, size = [], 1 << 20
    with publish(output) as directory:
        for name in range(40):
            (directory / str(name)).touch()
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now, resource.RLIM_INFINITY))
        AT_EXIT.append(lambda: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))
        while True:
            try:
                held.append(bytearray(size))
            except MemoryError:
                size //= 2
                if size < 64:
                    raise


def terminate(stage: str) -> None:
    """When a stage is announced, the process gets a SIGTERM."""
    _when(stage, lambda: os.kill(os.getpid(), signal.SIGTERM))


def interrupt(stage: str) -> None:
    """When a stage is announced, the process gets SIGINTs, as from a Ctrl+C that is held."""

    def press() -> None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # tests that run in the background inherit that it is ignored
    _when(stage, press)


def cut_file(option: list[str]) -> None:
    """When a stage is announced, a file loses half of its bytes."""
    stage, path = option
    _when(stage, lambda: os.truncate(path, os.stat(path).st_size // 2))


def spoil_file(option: list[str]) -> None:
    """When a stage is announced, the second half of a file becomes zeros."""
    stage, path = option
    half = os.stat(path).st_size // 2

    def spoil() -> None:
        with open(path, "r+b") as file:
            file.seek(half)
            file.write(bytes(half))

    _when(stage, spoil)


def _when(stage: str, act: Callable[[], object]) -> None:
    """Act when the command says on stderr that it is at this stage."""

    class Watched(io.TextIOBase):
        def write(self, text: str) -> int:
            if f"] {stage}" in text:
                act()
            return os.write(2, text.encode())

    sys.stderr = Watched()


_CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"})


def snapshots(option: list[str]) -> None:
    """Before each change to the files under a directory, copy it: what a kill at that moment would leave."""
    watched, copies = Path(option[0]), Path(option[1])
    busy = False

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal busy
        writes = event in _CHANGES or (event == "open" and _opens_to_write(args))
        if busy or not writes or str(watched) not in str(args[0]):
            return
        busy = True
        shutil.copytree(watched, copies / f"{len(os.listdir(copies)):04d} {event}")
        busy = False

    sys.addaudithook(hook)


def _opens_to_write(args: tuple[object, ...]) -> bool:
    return bool(int(str(args[2] or 0)) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


AT_EXIT: list[Callable[[], object]] = []


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    import peftfx.cli.main
    import peftfx.export.command  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        gc.freeze()  # so that a collection in a fork does not touch, and copy, every page
        replies.write(json.dumps(_attempt(json.loads(line))) + "\n")
        replies.flush()


def _attempt(request: dict[str, object]) -> dict[str, object]:
    with tempfile.TemporaryFile() as err, tempfile.TemporaryFile("w+") as names:
        child = os.fork()
        if child == 0:
            _child(request, err.fileno(), names.fileno())
        limit = request.get("kill_after")
        seconds = _watch(child, float("inf") if limit is None else float(str(limit)))
        status = os.waitpid(child, 0)[1]
        err.seek(0)
        names.seek(0)
        for name in names.read().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "err": err.read().decode(errors="replace"), "seconds": seconds}


def _watch(child: int, limit: float) -> float:
    """Wait for the end of a child, without reaping it, and kill it at the limit; returns its CPU seconds."""
    clock, patience = Path(f"/proc/{child}/schedstat"), time.monotonic() + PATIENCE
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if int(clock.read_text().split()[0]) >= limit * 1e9 or time.monotonic() > patience:
            os.kill(child, signal.SIGKILL)
            limit = patience = float("inf")
        time.sleep(0.001)
    return int(clock.read_text().split()[0]) / 1e9


def _child(request: dict[str, object], err: int, names: int) -> NoReturn:
    from peftfx.cli.main import main

    code: object = 1
    try:
        os.dup2(err, 1)
        os.dup2(err, 2)
        if request.get("setup"):
            globals()[str(request["setup"])](request.get("option"))
        sys.argv = ["peftfx", *request["words"]]  # type: ignore[misc]
        before = set(sys.modules)
        main()
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for last in AT_EXIT:
            last()
        if request.get("imports"):
            os.write(names, " ".join(set(sys.modules) - before).encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(str(code)))


if __name__ == "__main__":
    _serve()
