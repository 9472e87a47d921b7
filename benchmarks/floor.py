"""What the machine can do at best: the same bytes read and written by plain calls, with the same threads.

python benchmarks/floor.py warm|cold FILES... --write-bytes N --dir DIR
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from streamsoup.kernels.combine import read_sum
from streamsoup.maps import FileMap

TILE_BYTES = 2 << 20
RWF_DONTCACHE = 0x80


def in_threads(count: int, work: Callable[[Iterator[tuple[int, int]]], None], pieces: list[tuple[int, int]]) -> float:
    """Run a worker in several threads over one list of pieces; returns seconds."""
    lock, source = threading.Lock(), iter(pieces)

    def shared() -> Iterator[tuple[int, int]]:
        while True:
            with lock:
                piece = next(source, None)
            if piece is None:
                return
            yield piece

    threads = [threading.Thread(target=work, args=(shared(),)) for _ in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def mapped_read_seconds(files: list[str], threads: int) -> float:
    """Read and sum mapped files with one loop."""
    maps = [FileMap(file, os.path.getsize(file)) for file in files]
    pieces = [(k, o) for o in range(0, max(m.size_bytes for m in maps), TILE_BYTES) for k in range(len(maps))]

    def work(mine: Iterator[tuple[int, int]]) -> None:
        for k, offset in mine:
            nbytes = min(TILE_BYTES, maps[k].size_bytes - offset)
            if nbytes > 0:
                read_sum(maps[k].address + offset, nbytes)

    read_sum(maps[0].address, 4096)  # compiles
    seconds = in_threads(threads, work, pieces)
    for mapped in maps:
        mapped.close()
    return seconds


def write_seconds(nbytes: int, threads: int, folder: str) -> tuple[float, float]:
    """Write bytes into a fresh preallocated file and sync it; returns seconds without and with the sync."""
    block = np.random.default_rng(0).integers(0, 256, TILE_BYTES, dtype=np.uint8).data
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)

        def work(mine: Iterator[tuple[int, int]]) -> None:
            for _, offset in mine:
                os.pwrite(file.fileno(), block[: min(TILE_BYTES, nbytes - offset)], offset)

        seconds = in_threads(threads, work, [(0, o) for o in range(0, nbytes, TILE_BYTES)])
        began = time.perf_counter()
        os.fsync(file.fileno())
        return seconds, seconds + time.perf_counter() - began


def plain_seconds(files: list[str], write_bytes: int, threads: int, folder: str, mode: str) -> float:
    """Read files with plain calls while durably writing the output's bytes on the same disk.

    `mode` is ``buffered``, ``dontcache`` or ``direct``.
    """
    flags = os.O_RDONLY | (os.O_DIRECT if mode == "direct" else 0)
    fds = [os.open(file, flags) for file in files]
    sizes = [os.fstat(fd).st_size for fd in fds]
    pieces = [(k, o) for o in range(0, max(sizes), TILE_BYTES) for k in range(len(fds)) if o < sizes[k]]

    def read(mine: Iterator[tuple[int, int]]) -> None:
        raw = np.empty(TILE_BYTES + 4096, np.uint8)
        shift = -raw.ctypes.data % 4096
        buffer = raw[shift : shift + TILE_BYTES].data
        for k, offset in mine:
            os.preadv(fds[k], [buffer], offset, RWF_DONTCACHE if mode == "dontcache" else 0)

    writer = threading.Thread(target=write_seconds, args=(write_bytes, 1, folder))
    began = time.perf_counter()
    writer.start()
    in_threads(threads, read, pieces)
    writer.join()
    seconds = time.perf_counter() - began
    for fd in fds:
        os.close(fd)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("warm", "buffered", "dontcache", "direct"))
    parser.add_argument("files", nargs="+")
    parser.add_argument("--write-bytes", type=int, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dir", default=tempfile.gettempdir(), type=Path)
    args = parser.parse_args()
    if args.kind == "warm":
        read = mapped_read_seconds(args.files, args.threads)
        unsynced, synced = write_seconds(args.write_bytes, args.threads, str(args.dir))
        print(json.dumps({"read_seconds": read, "write_seconds": unsynced, "write_and_sync_seconds": synced}))
    else:
        seconds = plain_seconds(args.files, args.write_bytes, args.threads, str(args.dir), args.kind)
        print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
