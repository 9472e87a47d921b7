"""What memory, page cache and disk give at best, to plain loops with as many threads as the engine has."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from streamsoup.files import pwrite_all
from streamsoup.maps import FileMap, address_of
from streamsoup.read import RWF_DONTCACHE

PIECE_BYTES = 2 << 20
# A disk wants several requests in flight; more threads than cores cost plain calls nothing.
DISK_THREADS = 8
READ_MODES = ("buffered", "dontcache", "direct")
_ALIGNMENT = 4096
Pieces = Iterator[tuple[int, int]]


def in_threads(count: int, work: Callable[[Pieces], None], pieces: Sequence[tuple[int, int]]) -> float:
    """Run a worker in several threads over one list of pieces; returns seconds.

    Raises
    ------
    OSError
        The first of a worker's.
    """
    lock, source, errors = threading.Lock(), iter(pieces), list[OSError]()

    def shared() -> Pieces:
        while not errors:
            with lock:
                piece = next(source, None)
            if piece is None:
                return
            yield piece

    def run() -> None:
        try:
            work(shared())
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - began


def interleaved(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Pieces (file, offset) of several files: the first of each, the second of each ..."""
    return [(k, o) for o in range(0, max(sizes, default=0), PIECE_BYTES) for k in range(len(sizes)) if o < sizes[k]]


def stream_seconds(nbytes: int, threads: int, repeats: int) -> dict[str, list[float]]:
    """Time the loops of STREAM, and one that only reads, on arrays of `nbytes` each.

    Returns
    -------
    dict of loop to list of seconds
        ``copy``, ``scale``, ``add``, ``triad`` (see `streamsoup.kernels.stream`) and ``read``.
    """
    from streamsoup.kernels.combine import read_sum
    from streamsoup.kernels.stream import stream_loops

    loops = stream_loops()
    elements = nbytes // 8
    bounds = [elements * k // threads for k in range(threads + 1)]
    a, b, c = (np.empty(elements) for _ in range(3))
    for array in (a, b, c):
        array[:] = 1.0  # first touch: fresh memory would be measured
    found: dict[str, list[float]] = {name: [] for name in (*loops, "read")}

    def timed(name: str) -> float:
        def work(mine: Pieces) -> None:
            for first, last in mine:
                if name == "read":
                    read_sum(a.ctypes.data + 8 * first, 8 * (last - first))
                else:
                    loops[name](a[first:last], b[first:last], c[first:last])

        return in_threads(threads, work, list(itertools.pairwise(bounds)))

    for name in found:
        timed(name)
        found[name] = [timed(name) for _ in range(repeats)]
    return found


def mapped_read_seconds(files: Sequence[Path], threads: int) -> float:
    """Read and sum mapped files with one loop; new maps each time, as the engine has."""
    from streamsoup.kernels.combine import read_sum

    with contextlib.ExitStack() as stack:
        maps = [stack.enter_context(contextlib.closing(FileMap(str(p), p.stat().st_size))) for p in files]

        def work(mine: Pieces) -> None:
            for k, offset in mine:
                read_sum(maps[k].address + offset, min(PIECE_BYTES, maps[k].size_bytes - offset))

        read_sum(address_of(memoryview(bytearray(4096))), 4096)  # compiles
        return in_threads(threads, work, interleaved([m.size_bytes for m in maps]))


def plain_read_seconds(
    files: Sequence[Path], threads: int, *, mode: str = "buffered", beside: Callable[[], object] | None = None
) -> float:
    """Read files with `preadv` into reused buffers.

    Parameters
    ----------
    files : sequence of Path
    threads : int
    mode : {"buffered", "dontcache", "direct"}
    beside : callable, optional
        Run in a thread of its own at the same time; both must end.

    Raises
    ------
    OSError
        Where the system or the file system does not know the mode.
    """
    flags = os.O_RDONLY | (os.O_DIRECT if mode == "direct" else 0)
    with contextlib.ExitStack() as stack:
        fds: list[int] = []
        for path in files:
            fds.append(os.open(path, flags))
            stack.callback(os.close, fds[-1])
        errors: list[BaseException] = []
        sizes = [os.fstat(fd).st_size for fd in fds]

        def work(mine: Pieces) -> None:
            raw = np.empty(PIECE_BYTES + _ALIGNMENT, np.uint8)
            shift = -raw.ctypes.data % _ALIGNMENT
            buffer = raw[shift : shift + PIECE_BYTES].data
            for k, offset in mine:
                os.preadv(fds[k], [buffer], offset, RWF_DONTCACHE if mode == "dontcache" else 0)

        def run_beside(function: Callable[[], object]) -> None:
            try:
                function()
            except BaseException as error:  # raised again below
                errors.append(error)

        other = threading.Thread(target=run_beside, args=(beside,)) if beside is not None else None
        began = time.perf_counter()
        if other is not None:
            other.start()
        in_threads(threads, work, interleaved(sizes))
        if other is not None:
            other.join()
        if errors:
            raise errors[0]
        return time.perf_counter() - began


def write_seconds(nbytes: int, threads: int, folder: Path) -> tuple[float, float]:
    """Write bytes into a fresh preallocated file and sync it; returns seconds without and with the sync."""
    import tempfile

    block = np.random.default_rng(0).integers(0, 256, PIECE_BYTES, dtype=np.uint8).data
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)

        def work(mine: Pieces) -> None:
            for _, offset in mine:
                pwrite_all(file.fileno(), block[: nbytes - offset], offset)

        seconds = in_threads(threads, work, interleaved([nbytes]))
        began = time.perf_counter()
        os.fsync(file.fileno())
        return seconds, seconds + time.perf_counter() - began
