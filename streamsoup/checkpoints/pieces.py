"""Tensors that do not lie in one piece: with strides, or cut into rectangles.

A tensor is put together of pieces. A piece is a rectangle of it whose elements lie in a file at constant distances, one
for each dimension. A transposed or expanded tensor is one such piece, a sharded one is several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamsoup.checkpoints.derived import DerivedCheckpoint
from streamsoup.checkpoints.gathering import PackedPieces, PiecedSource, Sizes, is_contiguous, reach_of
from streamsoup.checkpoints.protocol import Checkpoint, Shard, StoredCheckpoint
from streamsoup.checkpoints.table import TensorTable, pack
from streamsoup.dtypes import DType
from streamsoup.source import STRIP_BYTES, PartReader, Source


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a tensor.

    Attributes
    ----------
    shard, begin : int
        Its first element: which file, which byte.
    offsets, sizes : tuple of int
        Where it lies in the tensor.
    strides : tuple of int
        From one element to the next in a dimension, in elements, not negative.
    """

    shard: int
    begin: int
    offsets: Sizes
    sizes: Sizes
    strides: Sizes

    @property
    def span(self) -> int:
        """Elements from its first to its last, both counted; it has one at least."""
        return 1 + reach_of(self.sizes, self.strides)


@dataclass(frozen=True, slots=True)
class Pieced:
    """A tensor and its pieces, which cover it; an empty one has a piece that says near which bytes it lies."""

    name: str
    dtype: DType
    shape: Sizes
    pieces: Sequence[Piece]

    @property
    def is_whole(self) -> bool:
        """Whether it lies in one piece, as in a safetensors file."""
        piece = self.pieces[0]
        return 0 in self.shape or (len(self.pieces) == 1 and is_contiguous(piece.sizes, piece.strides))


@dataclass(frozen=True)
class Arrangement:
    """Where the tensors of a checkpoint lie, whatever its files are called; equal ones are shared.

    Attributes
    ----------
    table : TensorTable
    spans : TensorTable or None
        What is read of the files, one row a piece; None if the tensors lie there as they are.
    pieces : PackedPieces or None
    """

    table: TensorTable
    spans: TensorTable | None
    pieces: PackedPieces | None

    def checkpoint(
        self, path: str, folder: Path | None, shards: tuple[Shard, ...], metadata: Mapping[str, str]
    ) -> Checkpoint:
        """Return the checkpoint of these files."""
        if self.spans is None or self.pieces is None:
            return StoredCheckpoint(path, folder, shards, self.table, metadata)
        part = StoredCheckpoint(path, folder, shards, self.spans, metadata)
        return PiecedCheckpoint(
            path, folder, (part,), self.table, metadata, self.table.dtypes, STRIP_BYTES, self.pieces
        )


@dataclass(frozen=True)
class PiecedCheckpoint(DerivedCheckpoint):
    """A `Checkpoint` whose tensors are put together of pieces."""

    pieces: PackedPieces

    @property
    def computes(self) -> bool:
        """See `DerivedCheckpoint`."""
        return False

    def derive(self, parts: Sequence[PartReader]) -> Source:
        """See `DerivedCheckpoint`."""
        return PiecedSource(parts[0], self.table, self.pieces)


def arrange(tensors: Sequence[Pieced]) -> Arrangement:
    """Make tables of tensors, in the order of their bytes."""
    tensors = sorted(tensors, key=lambda t: (t.pieces[0].shard, t.pieces[0].begin))
    table = pack(
        [t.name for t in tensors],
        [t.dtype for t in tensors],
        [t.shape for t in tensors],
        [t.pieces[0].begin for t in tensors],
        [t.pieces[0].shard for t in tensors],
    )
    if all(t.is_whole for t in tensors):
        return Arrangement(table, None, None)
    owned = [(t, [] if 0 in t.shape else t.pieces) for t in tensors]
    flat = [piece for _, pieces in owned for piece in pieces]
    spans = pack(
        [t.name for t, pieces in owned for _ in pieces],
        [t.dtype for t, pieces in owned for _ in pieces],
        [(piece.span,) for piece in flat],
        [piece.begin for piece in flat],
        [piece.shard for piece in flat],
    )
    packed = PackedPieces(
        firsts=np.cumsum([0, *(len(pieces) for _, pieces in owned)]),
        dim_starts=np.cumsum([0, *(len(piece.sizes) for piece in flat)]),
        offsets=np.array([n for piece in flat for n in piece.offsets], np.int64),
        sizes=np.array([n for piece in flat for n in piece.sizes], np.int64),
        strides=np.array([n for piece in flat for n in piece.strides], np.int64),
    )
    return Arrangement(table, spans, packed)
