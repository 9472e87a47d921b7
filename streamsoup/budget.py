"""What memory we may use, and what we do use."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

from streamsoup.tiling import MIB

DEFAULT_SHARE = 4
DEFAULT_MOST_BYTES = 2048 * MIB
_SAMPLE_SECONDS = 0.02
_SMALL_TENSOR_BYTES = 128 << 10
_PLAIN_WORKERS = 4  # one computes, the tiles of the others are being read or written


def default_budget_bytes() -> int:
    """A quarter of what the container or machine has free, at most 2 GiB."""
    return max(32 * MIB, min(DEFAULT_MOST_BYTES, free_bytes() // DEFAULT_SHARE))


def free_bytes() -> int:
    """Bytes that may still be allocated: the least of the machine's and the container's headroom."""
    import psutil

    headrooms = [int(psutil.virtual_memory().available)]
    headrooms += [room for room in (_cgroup_v2(), _cgroup_v1()) if room is not None]
    return max(0, min(headrooms))


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(workers: int | None, mode: str, *, tensor_bytes: float) -> int:
    """Choose threads that combine: as many as were asked for, else by cores and work.

    Parameters
    ----------
    workers : int or None
        What was asked for.
    mode : str
        From `streamsoup.read.choose_mode`: some more than the cores where they wait for plain reads.
    tensor_bytes : float
        Of an average tensor, in all ingredients together. Where tensors are small, most of the time goes to the
        interpreter, which two threads only fight for.
    """
    cores = available_cores()
    if workers is not None:
        return workers
    if mode == "plain":
        return max(_PLAIN_WORKERS, cores)
    return 1 if tensor_bytes < _SMALL_TENSOR_BYTES else cores


def _cgroup_v2(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Headroom of the innermost cgroup and its parents; reclaimable file pages count as free."""
    try:
        line = next(x for x in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines() if x[:3] == "0::")
    except (OSError, StopIteration, UnicodeDecodeError):
        return None
    group = root / line[3:].lstrip("/")
    rooms = [_headroom(g, "memory.max", "memory.current") for g in (group, *group.parents) if g != root.parent]
    found = [room for room in rooms if room is not None]
    return min(found) if found else None


def _cgroup_v1(root: Path = Path("/sys/fs/cgroup/memory")) -> int | None:
    return _headroom(root, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _headroom(group: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit = (group / limit_name).read_text(encoding="ascii").strip()
        usage = int((group / usage_name).read_text(encoding="ascii"))
        if not limit.isdigit() or int(limit) >= 1 << 60:  # "max", or v1's way of saying it
            return None
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    reclaimable = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return int(limit) - max(0, usage - reclaimable)


def owned_bytes() -> int:
    """Anonymous and shared memory of this process now, in bytes; 0 where the system does not say.

    From the counters of /proc/self/status: /proc/self/smaps_rollup is exact, but walks all mapped pages and would
    hold up the page faults of a run.
    """
    try:
        with open("/proc/self/status", "rb", buffering=0) as file:
            text = file.read(4096)
    except OSError:
        return 0
    total = 0
    for line in text.splitlines():
        if line.startswith((b"RssAnon:", b"RssShmem:")):
            total += 1024 * int(line.split()[1])
    return total


class PeakSampler:
    """Samples what the process owns above the level at which the sampler was entered.

    Attributes
    ----------
    peak_bytes : int
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._base = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streamsoup-memory", daemon=True)

    def __enter__(self) -> PeakSampler:
        self._base = owned_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> None:
        """Take one more sample now: runs shorter than the interval would be missed."""
        self.peak_bytes = max(self.peak_bytes, owned_bytes() - self._base)

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.sample()
