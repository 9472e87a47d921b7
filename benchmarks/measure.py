"""Run whole processes, time them, sample their memory; warm and drop caches; say what the machine is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from streamsoup.maps import FileMap

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
    peaks, ended = [0, 0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peaks[:] = map(max, peaks, _memory(process.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    ended.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Run(seconds, *peaks, output)


def _memory(pid: int) -> tuple[int, int]:
    """Owned and resident bytes of a process and its children, from cheap counters."""
    owned = resident = 0
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
        text = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
        fields = dict(line.split(":", 1) for line in text.splitlines())
        anonymous, shared, rss = (int(fields.get(k, "0").split()[0]) for k in ("RssAnon", "RssShmem", "VmRSS"))
        owned, resident = 1024 * (anonymous + shared), 1024 * rss
        for child in children:
            more = _memory(int(child))
            owned, resident = owned + more[0], resident + more[1]
    return owned, resident


def warm(files: Sequence[Path]) -> None:
    """Read files into the page cache."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
    if resident_share(files) < 0.99:
        raise SystemExit("The files do not stay in the page cache: there is too little memory for this case.")


def drop(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    if resident_share(files) > 0.01:
        raise SystemExit("The files stay in the page cache: this file system cannot be measured cold.")


def resident_share(files: Sequence[Path]) -> float:
    """Share of the files' bytes that are in the page cache."""
    shares = []
    for path in files:
        with contextlib.closing(FileMap(str(path), path.stat().st_size)) as mapped:
            shares.append(float(mapped.resident_shares(1 << 20).mean()))
    return statistics.mean(shares)


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
