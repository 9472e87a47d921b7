"""Run whole processes, time them, sample their memory; warm and drop caches; say what the machine is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Run:
    """A process that ended: seconds, peak owned bytes (anonymous and shared), peak resident bytes, what it printed."""

    seconds: float
    owned_bytes: int
    resident_bytes: int
    output: str


def run_process(command: Sequence[str], *, environment: dict[str, str] | None = None) -> Run:
    """Run a command and sample the memory of it and its children; a failure ends the benchmark."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    owned = resident = 0
    while process.poll() is None:
        anonymous, rss = _memory(process.pid)
        owned, resident = max(owned, anonymous), max(resident, rss)
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Run(seconds, owned, resident, output)


def _memory(pid: int) -> tuple[int, int]:
    owned = resident = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(OSError):
                fields = dict(
                    line.split(":", 1)
                    for line in Path(f"/proc/{process.pid}/status").read_text("ascii", "replace").splitlines()
                )
                kilobytes = [int(fields.get(key, "0").split()[0]) for key in ("RssAnon", "RssShmem", "VmRSS")]
                owned += 1024 * (kilobytes[0] + kilobytes[1])
                resident += 1024 * kilobytes[2]
    return owned, resident


def warm(files: Iterable[Path]) -> None:
    """Read files into the page cache."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def drop(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all samples."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "samples": list(values),
    }


def machine() -> dict[str, Any]:
    """Facts that figures depend on."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    names = ("streamsoup", "numpy", "numba", "torch", "safetensors")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
