"""A running sum on disk: whole generations of zarr v3 arrays, never updated in place.

::

    sums/
        gen-000007/
            zarr.json                    the group, written last; its attributes say what it is the sum of, and the
                                         digests of the chunks
            <tensor name>/zarr.json      one uncompressed array a tensor
            <tensor name>/c/0 ...        raw little-endian chunks

zarr makes the metadata (and reads the result); the chunks, which are plain bytes without a codec, are written and read
with pwrite and pread, since zarr's own path would copy and lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.backends.protocol import Backend
from streamsoup.checkpoints import TensorTable
from streamsoup.dtypes import DType
from streamsoup.errors import IngredientReadError
from streamsoup.files import pwrite_all, write_durably, writing_to
from streamsoup.maps import address_of
from streamsoup.open_files import OpenFiles
from streamsoup.source import Source
from streamsoup.tiling import BLOCK_ELEMENTS
from streamsoup.write import Sink

# 8 MiB of float64; 4 to 16 MiB did best. A tile is never larger than a chunk, and never crosses one.
CHUNK_ELEMENTS = 1 << 20
CHUNK_BYTES = 8 * CHUNK_ELEMENTS
_LONGEST_NAME = 1000
_ATTRIBUTE = "streamsoup"
_GENERATION = re.compile(r"gen-\d{6}")  # other folders there are not ours to remove
# A name that is no plain path (it may lead out of the folder) is replaced by a number.
_PLAIN_NAME = re.compile(r"(?!c$|zarr\.json$|manifest\.json$)[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def array_names(names: Sequence[str]) -> list[str]:
    """Names of the arrays of tensors: their own where that is a plain path, else ``tensor-`` and their position."""
    known = set(names)

    def is_plain(name: str) -> bool:
        parts = name.split("/")
        inside_another = any("/".join(parts[:i]) in known for i in range(1, len(parts)))
        return (
            all(_PLAIN_NAME.fullmatch(part) for part in parts)
            and not name.startswith("tensor-")
            and not inside_another
            and len(name) < _LONGEST_NAME
        )

    return [name if is_plain(name) else f"tensor-{i}" for i, name in enumerate(names)]


class GenerationStore(Sink):
    """See `SumStore`.

    Parameters
    ----------
    folder : Path
    table : TensorTable
        Of the sum.
    averaged : bool array, shape (tensors,)
    dtype : DType
        Of the sum.
    backend : Backend
        Digests the chunks.
    like : str
        Path of the ingredient that gives names and dtypes, to be found again.
    """

    in_place = False

    def __init__(
        self,
        folder: Path,
        table: TensorTable,
        averaged: npt.NDArray[np.bool_],
        dtype: DType,
        backend: Backend,
        *,
        like: str = "",
    ) -> None:
        self._folder = folder
        self._table = table
        self._sizes: list[int] = table.nbytes.tolist()
        self._names = array_names(table.names)
        self._averaged = averaged
        self._dtype = dtype
        self._backend = backend
        self._like = like
        self._metadata: dict[tuple[int, ...], str] = {}
        self._lock = threading.Lock()
        self._digests: dict[str, dict[str, int]] = {}
        self._next: Path | None = None
        folder.mkdir(parents=True, exist_ok=True)
        found = [path for path in folder.glob("gen-*") if _GENERATION.fullmatch(path.name)]
        numbers = [int(path.name[4:]) for path in found if (path / "zarr.json").exists()]
        self._number = max(numbers, default=0)

    @staticmethod
    def members_in(folder: Path) -> list[list[Any]]:
        """What the newest whole generation in a folder is the sum of; empty if there is none."""
        for path in sorted(folder.glob("gen-*/zarr.json"), reverse=True):
            return list((_read_manifest(path) or {}).get("members", []))
        return []

    @staticmethod
    def like_in(folder: Path) -> str | None:
        """Path of the ingredient that gave names and dtypes; None if it is not known."""
        for path in sorted(folder.glob("gen-*/zarr.json"), reverse=True):
            return (_read_manifest(path) or {}).get("like")
        return None

    @property
    def members(self) -> list[list[Any]] | None:
        """What the current generation is the sum of: what was given to `commit`; None if there is none."""
        manifest = self._manifest()
        return None if manifest is None else list(manifest["members"])

    @property
    def content_digests(self) -> dict[str, str]:
        """Content digests of the ingredients read so far, as given to `commit`."""
        return dict((self._manifest() or {}).get("content_digests", {}))

    @cached_property
    def layout(self) -> str:
        """A hash of the sum's dtype and of which tensor, by name and shape, lies in which array."""
        rows = sorted(
            [self._table.names[t], self._names[t], list(self._table.shape(t))]
            for t in np.flatnonzero(self._averaged).tolist()
        )
        return hashlib.blake2b(json.dumps([self._dtype.name, rows]).encode(), digest_size=16).hexdigest()

    @property
    def fits(self) -> bool:
        """Whether the current generation, if there is one, is a sum of the same tensors and dtype."""
        return bool((self._manifest() or {}).get("layout", self.layout) == self.layout)

    def verify(self) -> bool:
        """Read the current generation and compare its digests."""
        manifest = self._manifest()
        if manifest is None:
            return False
        try:
            return all(
                self._digest_chunk(self._path(self._number) / name / "c" / chunk, int(chunk), expected)
                for name, chunks in manifest["digests"].items()
                for chunk, expected in chunks.items()
            )
        except OSError:
            return False

    def _digest_chunk(self, path: Path, chunk: int, expected: list[int]) -> bool:
        """Compare one chunk with [bytes, digest]."""
        nbytes, digest = expected
        raw = np.fromfile(path, np.uint8, nbytes)
        first = chunk * CHUNK_ELEMENTS // BLOCK_ELEMENTS
        return len(raw) == nbytes and digest == self._backend.digest(
            raw.ctypes.data, nbytes, self._dtype.itemsize, first
        )

    def _manifest(self) -> dict[str, Any] | None:
        return _read_manifest(self._path(self._number) / "zarr.json")

    @property
    def _chunk_bytes(self) -> int:
        return CHUNK_ELEMENTS * self._dtype.itemsize

    def _path(self, number: int) -> Path:
        return self._folder / f"gen-{number:06d}"

    def source(self) -> Source:
        """See `SumStore`."""
        return _GenerationSource(self._path(self._number), self._table, self._chunk_bytes)

    def begin(self) -> Sink:
        """See `SumStore`."""
        self._next = self._path(self._number + 1)
        for path in self._folder.glob("gen-*"):
            if _GENERATION.fullmatch(path.name) and path != self._path(
                self._number
            ):  # with the new one there are two on disk, never three
                shutil.rmtree(path)
        with writing_to(self._next):
            for tensor in np.flatnonzero(self._averaged).tolist():
                folder = self._next / self._names[tensor]
                (folder / "c").mkdir(parents=True)
                (folder / "zarr.json").write_text(self._array_metadata(tensor), encoding="utf-8")
        self._digests = {}
        return self

    def _array_metadata(self, tensor: int) -> str:
        """Have zarr write the metadata of an array once for each shape: an array takes it a millisecond."""
        shape, name = self._table.shape(tensor), self._table.names[tensor]
        if shape not in self._metadata:
            import zarr

            parts = self._dtype.itemsize // np.dtype(self._numpy_dtype).itemsize
            elements = max(1, int(self._table.elements[tensor]))
            found: dict[str, Any] = {}
            store = zarr.storage.MemoryStore(found)
            zarr.create_array(
                store,
                shape=(int(self._table.elements[tensor]) * parts,),  # double-double: hi, lo, hi, lo ...
                chunks=(min(elements, CHUNK_ELEMENTS) * parts,),
                dtype=self._numpy_dtype,
                compressors=None,
                filters=None,
                fill_value=float("nan"),
                attributes={"shape": list(shape)},
                config={"write_empty_chunks": True},
            )
            self._metadata[shape] = bytes(found["zarr.json"].to_bytes()).decode()
        document = json.loads(self._metadata[shape])
        document["attributes"]["tensor"] = name
        return json.dumps(document)

    @property
    def _numpy_dtype(self) -> str:
        return "float32" if self._dtype.itemsize == 4 else "float64"

    def write(self, tensor: int, offset: int, buffer: memoryview) -> None:
        """See `Sink`; copied tensors are not kept."""
        if not self._averaged[tensor]:
            return
        assert self._next is not None
        name = self._names[tensor]
        chunk, inside = divmod(offset, self._chunk_bytes)
        full = min(self._chunk_bytes, self._sizes[tensor])
        path = self._next / name / "c" / str(chunk)
        with writing_to(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(fd, full)  # zarr pads the last chunk to the size of all
                pwrite_all(fd, buffer, inside)
            finally:
                os.close(fd)
        address = address_of(buffer)
        itemsize = self._dtype.itemsize
        digest = self._backend.digest(address, len(buffer), itemsize, offset // itemsize // BLOCK_ELEMENTS)
        with self._lock:
            chunks = self._digests.setdefault(name, {})
            chunks[str(chunk)] = (chunks.get(str(chunk), 0) + digest) % 2**64

    def sync(self) -> None:
        """See `Sink`. A generation need not be durable: its digests tell if it is whole, and it can be made anew."""

    def commit(self, members: Sequence[Sequence[Any]], content_digests: Mapping[str, str]) -> None:
        """See `SumStore`."""
        assert self._next is not None
        sizes = {self._names[t]: self._sizes[t] for t in np.flatnonzero(self._averaged).tolist()}
        digests = {
            name: {
                chunk: [min(self._chunk_bytes, sizes[name] - int(chunk) * self._chunk_bytes), digest]
                for chunk, digest in chunks.items()
            }
            for name, chunks in self._digests.items()
        }
        document = {"like": self._like, "members": [list(member) for member in members], "digests": digests}
        document["content_digests"] = dict(content_digests)
        document["layout"] = self.layout
        group = {"zarr_format": 3, "node_type": "group", "attributes": {_ATTRIBUTE: document}}
        write_durably(self._next / "zarr.json", json.dumps(group))
        self._number += 1


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """Read a manifest; None if it is missing or damaged, and with it the sum."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))["attributes"][_ATTRIBUTE]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return document if isinstance(document, dict) and document.keys() >= {"members", "digests"} else None


class _GenerationSource(Source):
    """Reads chunks through the page cache, where they mostly are: they were just written. See `Source`."""

    def __init__(self, folder: Path, table: TensorTable, chunk_bytes: int) -> None:
        self._folder = folder
        self._names = array_names(table.names)
        self._chunk_bytes = chunk_bytes
        self._files = OpenFiles()
        self._buffers = threading.local()

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        chunk, inside = divmod(offset, self._chunk_bytes)
        path = str(self._folder / self._names[position] / "c" / str(chunk))
        if staging is None:
            staging = self._own_buffer(nbytes)
        address = address_of(staging)
        try:
            with self._files.borrow(path) as fd:
                done = 0
                while done < nbytes:
                    count = os.preadv(fd, [staging[done:nbytes]], inside + done)
                    if count == 0:
                        raise OSError(0, "ends too early")
                    done += count
        except OSError as error:
            raise IngredientReadError(f"{path}: cannot be read ({error.strerror or error}).") from error
        return address

    def _own_buffer(self, nbytes: int) -> memoryview:
        buffer: npt.NDArray[np.uint8] | None = getattr(self._buffers, "array", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._buffers.array = np.empty(nbytes, np.uint8)
        return buffer[:nbytes].data

    def close(self) -> None:
        """See `Source`."""
        self._files.close()
