"""A format of one's own as an ingredient: folders of .npy files, and a checkpoint that is computed as it is read.

python examples/embedding/checkpoint.py
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import streamsoup
from streamsoup.checkpoints import DerivedCheckpoint, Shard, StoredCheckpoint
from streamsoup.checkpoints.table import pack
from streamsoup.dtypes import find_dtype
from streamsoup.maps import address_of
from streamsoup.source import STRIP_BYTES, PartReader, Source


def open_npy_folder(folder: Path) -> StoredCheckpoint:
    """Locate the arrays of a folder: where in which file each begins. The engine maps the files and reads no copy."""
    shards, names, dtypes, shapes, begins = [], [], [], [], []
    for path in sorted(folder.glob("*.npy")):
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            assert version == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            begin = file.tell()
            file.seek(0)
            header = hashlib.sha256(file.read(begin)).hexdigest()
            stat = os.fstat(file.fileno())
        found = find_dtype(dtype.name)
        if fortran or found is None or not dtype.isnative:
            raise ValueError(f"{path}: {dtype} in this order is no ingredient")
        shards.append(Shard(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, header))
        names.append(path.stem)
        dtypes.append(found)
        shapes.append(shape)
        begins.append(begin)
    table = pack(names, dtypes, shapes, begins, list(range(len(shards))))
    return StoredCheckpoint(str(folder), folder, tuple(shards), table, {})


@dataclass(frozen=True)
class Halved(DerivedCheckpoint):
    """Float32 tensors, halved. What is computed may depend on nothing but the bytes of the parts."""

    def derive(self, parts: Sequence[PartReader]) -> Source:
        return HalvedSource(parts[0])


class HalvedSource(Source):
    """Computes a tile when the engine asks for it, a strip at a time."""

    def __init__(self, part: PartReader) -> None:
        self._part = part

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        target = np.frombuffer(staging, np.float32)
        for start in range(0, nbytes, STRIP_BYTES):
            size = min(STRIP_BYTES, nbytes - start)
            with self._part.view(position, offset + start, size) as stored:
                np.multiply(stored.view(np.float32), 0.5, out=target[start // 4 : (start + size) // 4])
        return address_of(staging)

    def close(self) -> None:
        self._part.source.close()


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / f"run{i}" for i in range(3)]
        for folder in folders:
            folder.mkdir()
            np.save(folder / "weight.npy", rng.standard_normal((300, 500)).astype(np.float32))
            np.save(folder / "bias.npy", rng.standard_normal(500).astype(np.float32))
        runs = [open_npy_folder(folder) for folder in folders]
        arrays = [np.load(folder / "weight.npy") for folder in folders]

        with streamsoup.open(runs) as soup:  # a Checkpoint stands wherever a path does, in open and RunningSoup
            mean = np.mean([a.astype(np.float64) for a in arrays], axis=0).astype(np.float32)
            assert np.array_equal(soup["weight"].numpy(), mean)
            print("soup of .npy folders:", {key: soup.shape(key) for key in soup})

        last = runs[2]
        half = Halved(f"half of {last.path}", None, (last,), last.table, {}, last.table.dtypes, STRIP_BYTES)
        running = streamsoup.RunningSoup(runs[0]).add(runs[0]).add(half)
        expected = ((arrays[0].astype(np.float64) + arrays[2].astype(np.float64) / 2) / 2).astype(np.float32)
        assert np.array_equal(running.mean().tensors()["weight"].numpy(), expected)
        print(
            "running soup of a stored checkpoint and a computed one:", [m.path for m in running.members][1][:7], "..."
        )


if __name__ == "__main__":
    main()
