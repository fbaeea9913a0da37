"""measured: a command in a process of its own, its times, its peak of anonymous memory, the bytes it writes.

Anonymous memory is what the kernel cannot drop: a mapped file does not count, a copy of it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE = 0.02  #: seconds between two looks at a process's memory
READY = "READY"  #: line by which a process says that its imports are done


@dataclass(frozen=True)
class Measured:
    """What a process took.

    Attributes:
        wall, cpu: seconds, from its start to its end, CPU of the user and of the system.
        imports_cpu: CPU seconds of the part before it said that its imports were done.
        anonymous: peak of anonymous memory, bytes.
        imports_anonymous: the same when its imports were done.
        written: bytes that it handed to the disk, or to the page cache.
    """

    wall: float
    cpu: float
    imports_cpu: float
    anonymous: int
    imports_anonymous: int
    written: int

    @property
    def work_cpu(self) -> float:
        """CPU seconds beyond imports."""
        return self.cpu - self.imports_cpu


def ready() -> None:
    """Called by the measured process: its imports are done. Waits until that is noted."""
    used, status = os.times(), _anonymous(os.getpid())
    print(READY, json.dumps([used.user + used.system, status]), flush=True)


def measured(command: Sequence[str]) -> Measured:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with what it wrote to stderr.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak = written = 0
        # Waited for without reaping, so that /proc still has the counts of a process that ended.
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            peak = max(peak, _anonymous(process.pid))
            written = max(written, _written(process.pid))
            time.sleep(SAMPLE)
        written = max(written, _written(process.pid))
        wall = time.perf_counter() - start
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stdout is not None
        assert process.stderr is not None
        said, complained = process.stdout.read(), process.stderr.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{complained[-2000:]}")
    lines = [line for line in said.splitlines() if line.startswith(READY)]
    cpu, anonymous = json.loads(lines[-1].removeprefix(READY)) if lines else (0.0, 0)
    return Measured(wall, usage.ru_utime + usage.ru_stime, cpu, peak, anonymous, written)


def _anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def _written(process: int) -> int:
    try:
        counts = Path(f"/proc/{process}/io").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counts.splitlines() if line.startswith("wchar")), 0)


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache, so that every contender reads them from the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def versions() -> dict[str, str]:
    """Of what takes part, where it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "onnx", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
