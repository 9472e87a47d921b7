"""The machine: what it is, and the state of its page cache."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamsoup.budget import available_cores
from streamsoup.errors import StreamsoupError
from streamsoup.maps import FileMap

_PACKAGES = ("streamsoup", "numpy", "numba", "torch", "safetensors")
_DEFAULT_CACHE_BYTES = 32 << 20
_WARM_SHARE, _COLD_SHARE = 0.99, 0.01


def machine_facts() -> dict[str, Any]:
    """Facts that figures depend on."""
    import psutil

    return {
        "cpu": _cpu(),
        "cores": available_cores(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the system tells of."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def resident_share(files: Sequence[Path]) -> float:
    """Share of files' bytes that are in the page cache."""
    found = total = 0.0
    for path in files:
        size = path.stat().st_size
        with contextlib.closing(FileMap(str(path), size)) as mapped:
            shares = mapped.resident_shares(1 << 20)
        found += float(shares.mean()) * size
        total += size
    return found / total if total else 1.0


def warm(files: Sequence[Path]) -> float:
    """Read files into the page cache, and return which share of them is there.

    Raises
    ------
    StreamsoupError
        If they do not fit.
    """
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
    share = resident_share(files)
    if share < _WARM_SHARE:
        raise StreamsoupError(
            f"Only {share:.0%} of the files stay in the page cache. Take fewer or smaller ones, or measure with --cold."
        )
    return share


def drop(files: Sequence[Path]) -> float:
    """Drop files from the page cache, and return which share of them is left.

    Raises
    ------
    StreamsoupError
        If they stay: on a RAM disk, say, or where another process maps them.
    """
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(fd)  # what is not written yet cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    share = resident_share(files)
    if share > _COLD_SHARE:
        raise StreamsoupError(
            f"{share:.0%} of the files stay in the page cache, so they cannot be measured cold. Choose another --dir."
        )
    return share
