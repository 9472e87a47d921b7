"""Run whole processes, time them, and sample their memory."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Run:
    """A process that ended: seconds, peak owned bytes (anonymous and shared), peak resident bytes, what it printed."""

    seconds: float
    owned_bytes: int
    resident_bytes: int
    output: str


# A virtual machine gives freed memory back after some seconds, and takes a second to get a soup's page cache again. Who
# starts quickly finds that of the soup before: so all wait.
PAUSE_SECONDS = 5.0


def settle(small: bool = False) -> None:
    """Wait until what was freed is gone, so that whoever writes next begins as the others do."""
    if not small:
        time.sleep(PAUSE_SECONDS)


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


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all samples."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "samples": list(values),
    }


def figures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Seconds and peaks of runs whose last line of output is JSON with `engine_seconds`."""
    results = [json.loads(run.output.splitlines()[-1]) for run in runs]
    return {
        "process_seconds": summary([run.seconds for run in runs]),
        "engine_seconds": summary([r["engine_seconds"] for r in results]),
        "owned_bytes": max(run.owned_bytes for run in runs),
        "resident_bytes": max(run.resident_bytes for run in runs),
    }
