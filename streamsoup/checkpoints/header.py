"""Read and check the header of one safetensors file.

Stricter than the safetensors library: duplicate keys and unknown entry fields are refused too, since either may
hide a tensor from one reader and show it to another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from stat import S_ISREG
from typing import Any, NoReturn

import numpy as np

from streamsoup.checkpoints.table import TensorTable, pack
from streamsoup.dtypes import BY_NAME, DTYPES, DType
from streamsoup.errors import CheckpointError, CheckpointNotFoundError, HeaderError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_DIM = 2**53
_FIELDS = {"dtype", "shape", "data_offsets"}
_LONGEST_MESSAGE = 300  # a hostile header may have names and shapes of megabytes
_ADVICE = "Export or download the file again."


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes
    ----------
    table : TensorTable
        In file order; `begins` counts from the start of the file.
    metadata : mapping of str to str
    data_start, data_bytes : int
        Where the data begin in the file, and how many bytes they are.
    sha256 : str
        Hex digest of the header's bytes.
    """

    table: TensorTable
    metadata: Mapping[str, str]
    data_start: int
    data_bytes: int
    sha256: str


def read_header(
    path: str, cache: MutableMapping[str, Header] | None = None, names: MutableMapping[str, str] | None = None
) -> tuple[Header, os.stat_result]:
    """Read the header of a file, and the stat taken while it was open.

    Parameters
    ----------
    path : str
    cache : mutable mapping, optional
        Headers by digest. Fine-tunes of one network mostly have equal headers: those are parsed once and their
        tables shared.
    names : mutable mapping, optional
        Changed. Where headers differ, equal names are still kept once.

    Raises
    ------
    CheckpointNotFoundError, CheckpointError, HeaderError
    """
    with reading(path, "a .safetensors file") as (fd, stat):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no pages beyond the header: see identity.py
        raw = _read_raw(fd, path, stat.st_size)
    digest = hashlib.sha256(raw).hexdigest()
    header = cache.get(digest) if cache is not None else None
    if header is None:
        header = _Parser(path, {} if names is None else names).parse(raw, digest)
        if cache is not None:
            cache[digest] = header
    end = header.data_start + header.data_bytes
    if end != stat.st_size:
        what = "truncated" if stat.st_size < end else "has trailing bytes"
        raise HeaderError(
            f"{path}: {what}: the header describes {end:,} bytes, the file has {stat.st_size:,}. {_ADVICE}",
            path=path,
        )
    return header, stat


@contextlib.contextmanager
def reading(path: str, kind: str) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file for reading; `kind`: what should have been named, for the message.

    Raises
    ------
    CheckpointNotFoundError, CheckpointError
        Also in place of an `OSError` inside the block.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not hold us up
        try:
            stat = os.fstat(fd)
            if not S_ISREG(stat.st_mode):
                raise CheckpointError(f"{path}: cannot be read: it is no regular file. Name {kind}.", path=path)
            yield fd, stat
        finally:
            os.close(fd)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path}: no such file.", path=path) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).", path=path) from error


def _read_raw(fd: int, path: str, file_bytes: int) -> bytes:
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2:
        raise HeaderError(f"{path}: too short for a safetensors file. {_ADVICE}", path=path)
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{path}: header of {length:,} bytes, but at most {MAX_HEADER_BYTES:,} are allowed; this is no "
            f"safetensors file or it is damaged. {_ADVICE}",
            path=path,
        )
    if 8 + length > file_bytes:
        raise HeaderError(
            f"{path}: truncated: header of {length:,} bytes in a file of {file_bytes:,}. {_ADVICE}", path=path
        )
    raw = b""
    while len(raw) < length and (piece := os.pread(fd, length - len(raw), 8 + len(raw))):
        raw += piece
    return raw


class _Parser:
    """Checks one header; holds the path for the messages."""

    def __init__(self, path: str, names: MutableMapping[str, str]) -> None:
        self._path = path
        self._names = names

    def _fail(self, message: str) -> NoReturn:
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]} ..."
        raise HeaderError(f"{self._path}: {message}. {_ADVICE}", path=self._path)

    def parse(self, raw: bytes, digest: str) -> Header:
        document = self._load(raw)
        metadata = document.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._fail("__metadata__ is not a mapping of strings to strings")
        try:
            "".join(document).encode()
        except UnicodeEncodeError:
            self._fail("a tensor name is not valid Unicode (a lone surrogate)")
        shared = self._names.setdefault
        names = [shared(name, name) for name in document]
        data_start = 8 + len(raw)
        found = self._all_entries(names, list(document.values()), data_start)
        if found is None:  # something is odd: one by one, so that it can be named
            entries = [(name, *self._entry(name, entry)) for name, entry in zip(names, document.values(), strict=True)]
            entries.sort(key=lambda e: (e[3], e[4]))
            end = self._check_contiguous(entries)
            table = pack(
                [entry[0] for entry in entries],
                [entry[1] for entry in entries],
                [entry[2] for entry in entries],
                [data_start + entry[3] for entry in entries],
            )
            found = table, end
        return Header(found[0], metadata, data_start, found[1], digest)

    def _all_entries(self, names: list[str], entries: list[Any], data_start: int) -> tuple[TensorTable, int] | None:
        """Check all entries at once with array operations; None if anything at all is odd.

        Three times as fast as one by one; headers of 20,000 tensors are common among mixtures of experts.
        """
        try:
            dtypes = [BY_NAME[entry["dtype"]] for entry in entries]
            shapes = [entry["shape"] for entry in entries]
            begins, ends = zip(*[entry["data_offsets"] for entry in entries], strict=True)
            dims = [size for shape in shapes for size in shape]
            plain = all(len(entry) == 3 for entry in entries) and all(type(shape) is list for shape in shapes)
            if not plain or {*map(type, dims), *map(type, begins), *map(type, ends)} - {int}:
                return None
            if any(type(entry["data_offsets"]) is not list for entry in entries):
                return None
            start, stop = np.array(begins, np.int64), np.array(ends, np.int64)
            if dims and not 0 <= min(dims) <= max(dims) <= MAX_DIM:
                return None
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        order = np.lexsort((stop, start)).tolist()
        sorted_start, sorted_stop = start[order], stop[order]
        if sorted_start[0] != 0 or (sorted_start[1:] != sorted_stop[:-1]).any() or (sorted_stop < sorted_start).any():
            return None
        table = pack(
            [names[i] for i in order],
            [dtypes[i] for i in order],
            [shapes[i] for i in order],
            (sorted_start + data_start).tolist(),
        )
        bits = np.array([dtype.bits for dtype in DTYPES], np.int64)[table.dtypes]
        if (bits < 8).any() or table.largest_count() * 16.0 >= 2.0**62:
            return None
        if (table.nbytes != sorted_stop - sorted_start).any():
            return None
        return table, int(sorted_stop[-1])

    def _load(self, raw: bytes) -> dict[str, Any]:
        if raw[:1] != b"{":
            self._fail("header is not a JSON object")
        try:
            document = json.loads(raw.decode("utf-8"), object_pairs_hook=self._unique, parse_constant=self._constant)
        except UnicodeDecodeError:
            self._fail("header is not valid UTF-8")
        except RecursionError:
            self._fail("header is nested too deeply")
        except ValueError as error:
            if isinstance(error, HeaderError):
                raise
            self._fail(f"header is not valid JSON ({error})")
        if not isinstance(document, dict):
            self._fail("header is not a JSON object")
        return document

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            self._fail(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r} in the header")
        return result

    def _constant(self, text: str) -> NoReturn:
        self._fail(f"{text} in the header")

    def _entry(self, name: str, entry: Any) -> tuple[DType, list[int], int, int]:
        if not isinstance(entry, dict) or entry.keys() != _FIELDS:
            found = sorted(entry) if isinstance(entry, dict) else entry
            self._fail(f"tensor {name!r}: entry with {found}, expected exactly {sorted(_FIELDS)}")
        raw_dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = BY_NAME.get(raw_dtype) if isinstance(raw_dtype, str) else None
        if dtype is None:
            self._fail(f"tensor {name!r}: unknown dtype {raw_dtype!r}")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= MAX_DIM for n in shape):
            self._fail(f"tensor {name!r}: shape {shape!r} is not a list of sizes")
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or type(offsets[0]) is not int
            or type(offsets[1]) is not int
            or not 0 <= offsets[0] <= offsets[1] < 2**63
        ):
            self._fail(f"tensor {name!r}: data_offsets {offsets!r} are not two ascending byte positions")
        elements = 1
        for size in shape:
            elements *= size
        if elements * dtype.bits != 8 * (offsets[1] - offsets[0]):
            self._fail(
                f"tensor {name!r}: {dtype.name} of shape {tuple(shape)} takes {dtype.nbytes(elements):,} bytes, "
                f"but data_offsets span {offsets[1] - offsets[0]:,}"
            )
        return dtype, shape, offsets[0], offsets[1]

    def _check_contiguous(self, entries: list[tuple[str, DType, list[int], int, int]]) -> int:
        end = 0
        for name, _, _, begin, stop in entries:
            if begin != end:
                what = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
                self._fail(f"tensor {name!r}: begins at byte {begin:,} of the data, expected {end:,}: it {what}")
            end = stop
        return end
