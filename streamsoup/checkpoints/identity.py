"""Knowing an ingredient again: fine-tunes of one network have equal headers, so a header identifies nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from streamsoup.checkpoints.derived import DerivedCheckpoint
from streamsoup.checkpoints.protocol import Checkpoint, Shard
from streamsoup.errors import ChangedIngredientError, IngredientReadError
from streamsoup.maps import PAGE_BYTES, FileMap

SAMPLE_BYTES = 256
_AT_ONCE = 4096
_PROBED_BYTES = 1 << 20
# To ask of one page takes Python as long as the kernel takes for so many at once.
_PAGES_A_QUESTION = 64


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """What one shard was: its stat, its header, and a hash of bytes from the middle of every tensor."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    header_sha256: str
    sampled_blake2b: str


def identify(checkpoint: Checkpoint) -> tuple[ShardIdentity, ...]:
    """Read a little of every tensor and say who this ingredient is.

    Raises
    ------
    ChangedIngredientError
        If a shard's size or time changed since the checkpoint was opened.
    IngredientReadError
    """
    if isinstance(checkpoint, DerivedCheckpoint):
        found = tuple(shard for part in checkpoint.parts for shard in identify(part))
        settings = checkpoint.settings
        return tuple(_with_settings(shard, settings) for shard in found) if settings else found
    return tuple(_identify_shard(checkpoint, i, shard) for i, shard in enumerate(checkpoint.shards))


def _with_settings(shard: ShardIdentity, settings: str) -> ShardIdentity:
    digest = hashlib.sha256(f"{shard.header_sha256} {settings}".encode()).hexdigest()
    return replace(shard, header_sha256=digest)


def _identify_shard(checkpoint: Checkpoint, number: int, shard: Shard) -> ShardIdentity:
    table = checkpoint.table
    mine = np.flatnonzero(table.shards == number)
    mine = mine[np.argsort(table.begins[mine], kind="stable")]  # by file position, however they are numbered
    sizes = table.nbytes[mine]
    # The middle, not the start: embeddings of rare tokens, which many fine-tunes leave alone, often come first.
    begins = (table.begins[mine] + np.maximum(0, sizes // 2 - SAMPLE_BYTES // 2)).tolist()
    ends = (table.begins[mine] + sizes).tolist()
    digest = hashlib.blake2b(digest_size=16)
    try:
        fd = os.open(shard.path, os.O_RDONLY)
        try:
            stat = os.fstat(fd)
            _expect_unchanged(shard, stat)
            with contextlib.closing(FileMap(shard.path, stat.st_size)) as mapped:
                many = stat.st_size < len(begins) * _PAGES_A_QUESTION * PAGE_BYTES
                all_cached = many and bool((mapped.resident_shares(_PROBED_BYTES) == 1).all())
                for sample in _read_samples(fd, begins, ends, (lambda _: True) if all_cached else mapped.resident):
                    digest.update(sample)
        finally:
            os.close(fd)
    except OSError as error:
        raise IngredientReadError(f"{shard.path}: cannot be read ({error.strerror}).") from error
    return ShardIdentity(
        shard.path, stat.st_size, stat.st_mtime_ns, stat.st_ino, shard.header_sha256, digest.hexdigest()
    )


def _read_samples(
    fd: int, begins: Sequence[int], ends: Sequence[int], is_cached: Callable[[int], bool]
) -> Iterator[bytes]:
    """Yield the sample of every tensor, and leave cold files cold.

    All requests are made first, so that the disk sees many at once. What they bring into the page cache is dropped: a
    page here and there would halve the rate at which the whole file is read later.
    """
    places = [(begin, min(SAMPLE_BYTES, end - begin)) for begin, end in zip(begins, ends, strict=True)]
    for first in range(0, len(places), _AT_ONCE):
        batch = places[first : first + _AT_ONCE]
        touched = {p for begin, nbytes in batch for p in (begin // PAGE_BYTES, (begin + nbytes - 1) // PAGE_BYTES)}
        cold = [page * PAGE_BYTES for page in sorted(touched) if not is_cached(page * PAGE_BYTES)]
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no more than is asked for
            for begin in cold:
                os.posix_fadvise(fd, begin, PAGE_BYTES, os.POSIX_FADV_WILLNEED)
        for begin, nbytes in batch:
            yield os.pread(fd, nbytes, begin)
        with contextlib.suppress(OSError):
            for begin in cold:
                os.posix_fadvise(fd, begin, PAGE_BYTES, os.POSIX_FADV_DONTNEED)


def _expect_unchanged(shard: Shard, stat: os.stat_result) -> None:
    if (stat.st_size, stat.st_mtime_ns) != (shard.size_bytes, shard.mtime_ns):
        raise ChangedIngredientError(
            f"{shard.path}: changed while it was being read ({shard.size_bytes:,} bytes when opened, "
            f"{stat.st_size:,} now). Wait until it is written, then start again."
        )


def verify_unchanged(checkpoint: Checkpoint) -> None:
    """Check size and time of all shards once more, after the work.

    Raises
    ------
    ChangedIngredientError
    """
    for shard in checkpoint.shards:
        try:
            _expect_unchanged(shard, os.stat(shard.path))
        except OSError as error:
            raise ChangedIngredientError(
                f"{shard.path}: vanished while it was being read ({error.strerror}). Put it back and resume."
            ) from error


def identity_to_json(identity: tuple[ShardIdentity, ...]) -> list[dict[str, Any]]:
    """Plain data for a manifest or journal."""
    return [asdict(shard) for shard in identity]


def identity_key(identity: Sequence[Mapping[str, Any]]) -> str:
    """Hash an ingredient's identity: what it holds, not where it lies or when it was written."""
    parts = [(s["size_bytes"], s["header_sha256"], s["sampled_blake2b"]) for s in identity]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def expect_identity(
    checkpoint: Checkpoint, expected: Sequence[Mapping[str, Any]], *, what: str, otherwise: str = "restart"
) -> None:
    """Check that an ingredient is what was written down.

    A copy in another place, with another inode or time but the same bytes, passes.

    Raises
    ------
    ChangedIngredientError
        Naming the first difference.
    """
    found = identity_to_json(identify(checkpoint))
    if len(found) != len(expected):
        raise ChangedIngredientError(
            f"{checkpoint.path}: {len(found)} shards, but {len(expected)} when {what}. Put the old files back, or "
            f"{otherwise}."
        )
    for now, then in zip(found, expected, strict=True):
        for field in ("size_bytes", "header_sha256", "sampled_blake2b"):
            if now[field] != then[field]:
                difference = {
                    "size_bytes": "size",
                    "header_sha256": "header, or what is configured beside it,",
                    "sampled_blake2b": "data",
                }[field]
                raise ChangedIngredientError(
                    f"{now['path']}: its {difference} changed since {what}. Put the old file back, or {otherwise}."
                )
