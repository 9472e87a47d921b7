"""Checkpoints of 8-bit floats with scales, dequantised as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.derived import DerivedCheckpoint, scratch_bytes_of
from streamsoup.checkpoints.grids import DEFAULT_BLOCK, Block, Grid, grid_of
from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.checkpoints.scales import SCALE_SUFFIXES, ScaleFinder, block_of
from streamsoup.checkpoints.table import TensorTable
from streamsoup.dtypes import BY_NAME, DType
from streamsoup.kernels import block_scaled
from streamsoup.maps import address_of
from streamsoup.source import STRIP_BYTES, PartReader, Source

_ODD = np.array([d.is_fp8 or d.name in ("F8_E8M0", "I8", "U8", "I32") for d in BY_NAME.values()])
_FP8 = np.array([d.is_fp8 for d in BY_NAME.values()])
_QUANTISATION = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Scaling:
    """What a checkpoint shows of a table, and with what scales: the same for equal tables.

    Attributes
    ----------
    stored : TensorTable
    shown : TensorTable
    positions : int64 array, shape (shown,)
        Of the tensors in the stored table.
    scales : int64 array, shape (shown,)
        Of their scales there; -1: none.
    out_dtypes : uint8 array, shape (shown,)
    unused : int
        How many scales change no weight.
    """

    stored: TensorTable
    shown: TensorTable
    positions: npt.NDArray[np.int64]
    scales: npt.NDArray[np.int64]
    out_dtypes: npt.NDArray[np.uint8]
    unused: int

    def grid(self, tensor: int, block: Block) -> Grid:
        """Return how the scales of a tensor lie."""
        scale = int(self.scales[tensor])
        may_repeat = not self.stored.names[scale].endswith(SCALE_SUFFIXES[0])
        found = grid_of(self.shown.shape(tensor), self.stored.shape(scale), block, may_repeat=may_repeat)
        assert found is not None  # the finder looked at it
        return found


@dataclass(frozen=True)
class ScaledCheckpoint(DerivedCheckpoint):
    """Weights of 8-bit floats times their scales, as float32; all other tensors as they are.

    Attributes
    ----------
    scaling : Scaling
    block : (int, int)
    """

    scaling: Scaling
    block: Block

    def derive(self, parts: Sequence[PartReader]) -> Source:
        """See `DerivedCheckpoint`."""
        return ScaledSource(self.scaling, self.block, parts[0])

    def prepare(self) -> None:
        """See `DerivedCheckpoint`."""
        block_scaled.prepare("dequantise")

    @property
    def settings(self) -> str:
        """See `DerivedCheckpoint`: how scales lie over weights may follow from config.json."""
        scaled = np.flatnonzero(self.scaling.scales >= 0).tolist()
        return repr([self.scaling.grid(position, self.block).sizes for position in scaled])

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `DerivedCheckpoint`."""
        said = "8-bit floats were multiplied by their scales."
        if not self.scaling.unused:
            return (said,)
        return said, "Scales of activations, keys and values (input_scale, k_scale ...) were left out."

    @property
    def left_out(self) -> frozenset[str]:
        """See `DerivedCheckpoint`."""
        return frozenset({"hf_quant_config.json"})

    def configured(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """See `DerivedCheckpoint`."""
        inner = document.get("text_config")
        if isinstance(inner, Mapping):
            document = {**document, "text_config": {k: v for k, v in inner.items() if k not in _QUANTISATION}}
        return {key: value for key, value in document.items() if key not in _QUANTISATION}


Scalings = dict[tuple[int, Block], tuple[TensorTable, Scaling | None]]


def dequantised(checkpoint: Checkpoint, known: Scalings | None = None) -> Checkpoint:
    """Show the weights of a checkpoint that are 8-bit floats with scales as the numbers that they stand for.

    Parameters
    ----------
    checkpoint : Checkpoint
        Returned as it is, where it has no such weights.
    known : dict, optional
        Changed. What was found of tables before: fine-tunes of one network share them.

    Raises
    ------
    UnsupportedDTypeError
        If it holds quantised numbers of another kind.
    CheckpointError
    """
    if not _ODD[checkpoint.table.dtypes].any():
        return checkpoint
    block = block_of(_folder_of(checkpoint)) if _may_have_blocks(checkpoint.table) else DEFAULT_BLOCK
    known = {} if known is None else known
    key = id(checkpoint.table), block  # the table is kept, so that its id is not another's
    if key not in known:
        known[key] = checkpoint.table, _scaling(checkpoint, block)
    scaling = known[key][1]
    if scaling is None:
        return checkpoint
    return ScaledCheckpoint(
        path=checkpoint.path,
        folder=checkpoint.folder,
        parts=(checkpoint,),
        table=scaling.shown,
        metadata=checkpoint.metadata,
        out_dtypes=scaling.out_dtypes,
        scratch_bytes=4 * STRIP_BYTES + scratch_bytes_of(checkpoint),
        scaling=scaling,
        block=block,
    )


def _may_have_blocks(table: TensorTable) -> bool:
    return bool(_FP8[table.dtypes].any()) and any(name.endswith(SCALE_SUFFIXES) for name in table.names)


def _folder_of(checkpoint: Checkpoint) -> Path | None:
    """Where a configuration would lie, also of a checkpoint that was named by its file."""
    return checkpoint.folder or next((Path(shard.path).parent for shard in checkpoint.shards), None)


def _scaling(checkpoint: Checkpoint, block: Block) -> Scaling | None:
    finder, stored = ScaleFinder(checkpoint, block), checkpoint.table
    pairs = finder.pairs()
    if not pairs:
        return None
    unused = finder.unused(pairs)
    positions = np.setdiff1d(np.arange(len(stored)), [*pairs.values(), *unused])
    scales = np.array([pairs.get(i, -1) for i in positions.tolist()], np.int64)
    shown = stored.take(positions)
    scaled = scales >= 0
    dtypes = np.where(scaled, np.uint8(BY_NAME["F32"].index), shown.dtypes).astype(np.uint8)
    out_dtypes = np.where(scaled, np.uint8(BY_NAME["BF16"].index), shown.dtypes).astype(np.uint8)
    return Scaling(stored, replace(shown, dtypes=dtypes), positions, scales, out_dtypes, len(unused))


class ScaledSource(Source):
    """Multiplies weights by their scales, a strip at a time. See `Source`."""

    def __init__(self, scaling: Scaling, block: Block, part: PartReader) -> None:
        self._scaling = scaling
        self._block = block
        self._part = part

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        scaling = self._scaling
        weight, scale = int(scaling.positions[position]), int(scaling.scales[position])
        if scale < 0:
            return self._part.source.fetch(weight, offset, nbytes, staging)
        assert staging is not None
        code, dtype = scaling.stored.dtype(weight).kernel_code, scaling.stored.dtype(scale)
        grid, target = scaling.grid(position, self._block), address_of(staging)
        first, end = offset // 4, (offset + nbytes) // 4
        while first < end:
            # A quarter: in buffers, scales are as many float32 besides.
            count, at, scales = grid.piece(first, min(STRIP_BYTES, end - first), STRIP_BYTES // 4)
            with (
                self._part.view(weight, first, count) as stored,
                self._part.view(scale, at * dtype.itemsize, scales * dtype.itemsize) as raw,
            ):
                factors = as_singles(raw, dtype)
                address = factors.ctypes.data
                block_scaled.dequantise(stored.ctypes.data, code, first, count, grid.sizes, address, at, target)
            first, target = first + count, target + 4 * count
        return address_of(staging)

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        for place in self._places(position, offset, nbytes):
            self._part.source.load(*place)

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        for place in self._places(position, offset, nbytes):
            self._part.source.drop(*place)

    def _places(self, position: int, offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """Yield what is read of the part for some bytes of a tensor."""
        scaling = self._scaling
        weight, scale = int(scaling.positions[position]), int(scaling.scales[position])
        if scale < 0 or not nbytes:
            yield weight, offset, nbytes
            return
        itemsize = scaling.stored.dtype(scale).itemsize
        first, scales = scaling.grid(position, self._block).span(offset // 4, nbytes // 4)
        yield weight, offset // 4, nbytes // 4
        yield scale, first * itemsize, scales * itemsize

    def close(self) -> None:
        """See `Source`."""
        self._part.source.close()


def as_singles(raw: npt.NDArray[np.uint8], dtype: DType) -> npt.NDArray[Any]:
    """Decode bytes of a float dtype of at most 32 bits, exactly; those of float32 are returned as they are."""
    if dtype.name == "F32":
        return raw
    if dtype.name == "F16":
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
