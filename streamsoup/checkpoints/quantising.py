"""Checkpoints whose linear weights are quantised to fp8 with a scale for each block, as they are read."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.derived import DerivedCheckpoint, scratch_bytes_of
from streamsoup.checkpoints.grids import DEFAULT_BLOCK, Grid, block_grid
from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.checkpoints.scaled import ScaledCheckpoint
from streamsoup.checkpoints.scales import SCALE_SUFFIXES
from streamsoup.checkpoints.table import TensorTable, pack
from streamsoup.dtypes import BY_NAME
from streamsoup.errors import CheckpointError
from streamsoup.kernels import block_scaled
from streamsoup.layers import layer_of
from streamsoup.maps import address_of, bytes_at
from streamsoup.source import STRIP_BYTES, PartReader, Source

_LARGEST = np.float32(448.0)
# Of scales: below, processors may take numbers as zero, and a quotient would be infinite.
_LEAST = np.float32(2.0**-126)
_KEPT_LINES = 64
_SOURCES = ("BF16", "F16", "F32")
# Rows that are looked up, gains, routers of experts and what makes the output.
_NOT_LINEAR = re.compile(r"embed|embd|norm|(?:^|\.)(?:ln_\w+|wte|wpe|\w*gate|\w*router|\w*head|score|\w*classifier)\.")
WEIGHT, SCALE, OTHER = 0, 1, 2


@dataclass(frozen=True)
class QuantisedCheckpoint(DerivedCheckpoint):
    """A checkpoint with some weights as e4m3, each followed by the scales of its blocks, 128 times 128.

    A scale is the largest magnitude of its block divided by 448, in float32, at least 2⁻¹²⁶, and 1 for a block of
    zeros. A weight is divided by it in float32, cut off at 448, and rounded to nearest even. A block with a NaN is NaN,
    and one with an infinity has an infinite scale.

    Attributes
    ----------
    inner : int64 array, shape (tensors,)
        Positions in the part's table: for scales, of their weights.
    kinds : uint8 array, shape (tensors,)
        What a tensor is: `WEIGHT`, `SCALE` or `OTHER`.
    """

    inner: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]

    @property
    def settled(self) -> npt.NDArray[np.bool_]:
        """See `DerivedCheckpoint`."""
        settled: npt.NDArray[np.bool_] = self.kinds != OTHER
        return settled

    def derive(self, parts: Sequence[PartReader]) -> Source:
        """See `DerivedCheckpoint`."""
        return QuantisedSource(self, parts[0])

    def prepare(self) -> None:
        """See `DerivedCheckpoint`."""
        super().prepare()
        block_scaled.prepare("largest", "quantise")

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `DerivedCheckpoint`."""
        count = int((self.kinds == WEIGHT).sum())
        said = f"{count:,} weight(s) were quantised to fp8 (e4m3) with a scale for each block of 128x128"
        return *super().remarks, f"{said} (quantization_config of config.json says so)."

    def configured(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """See `DerivedCheckpoint`."""
        names, table = self.table.names, self.table
        left = [
            names[i].removesuffix(".weight")
            for i in np.flatnonzero(self.kinds == OTHER).tolist()
            if names[i].endswith(".weight") and len(table.shape(i)) == 2
        ]
        quantisation: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(DEFAULT_BLOCK),
        }
        if left:
            quantisation["modules_to_not_convert"] = sorted(left)
        return {**super().configured(document), "quantization_config": quantisation}


def scaled_names(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the weights of a checkpoint that are stored as 8-bit floats with scales."""
    if isinstance(checkpoint, ScaledCheckpoint):
        return frozenset(checkpoint.table.names[i] for i in np.flatnonzero(checkpoint.scaling.scales >= 0).tolist())
    if isinstance(checkpoint, DerivedCheckpoint):
        return frozenset[str]().union(*(scaled_names(part) for part in checkpoint.parts)) & {*checkpoint.table.names}
    return frozenset()


def quantised(checkpoint: Checkpoint, names: Collection[str] | None = None) -> QuantisedCheckpoint:
    """Quantise linear weights of a checkpoint to fp8, with a scale for each block, as it is read.

    Parameters
    ----------
    checkpoint : Checkpoint
    names : collection of str, optional
        Which weights; by default those that are stored so (`scaled_names`), and if there are none, all of shape
        (at least 128, at least 128) in numbered layers whose names end in ``.weight``, but for embeddings, norms,
        gates and routers, heads and classifiers.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be quantised.

    Notes
    -----
    Each byte of a weight is read two or three times: for the scales, which are a tensor of their own, for those of a
    tile, and for the tile.
    """
    table = checkpoint.table
    chosen = set(scaled_names(checkpoint) if names is None else names) or (
        {n for i, n in enumerate(table.names) if _is_linear(table, i)} if names is None else set()
    )
    stored = set(table.names)
    if not chosen or (missing := chosen - stored):
        what = f"{min(missing)}: is not in {checkpoint.path}" if chosen else f"{checkpoint.path}: has no linear weights"
        raise CheckpointError(f"{what}, so that it cannot be quantised. Name other weights.", path=checkpoint.path)
    rows: list[tuple[str, int, int]] = []  # name, position in the part, kind
    for i, name in enumerate(table.names):
        rows.append((name, i, WEIGHT if name in chosen else OTHER))
        if name in chosen:
            _refuse_unfit(checkpoint, i, stored)
            rows.append((name + SCALE_SUFFIXES[0], i, SCALE))
    shown = pack(
        [name for name, _, _ in rows],
        [table.dtype(i) if kind == OTHER else BY_NAME[("F8_E4M3", "F32")[kind]] for _, i, kind in rows],
        [_scale_shape(table.shape(i)) if kind == SCALE else table.shape(i) for _, i, kind in rows],
        [int(table.begins[i]) for _, i, _ in rows],
        [int(table.shards[i]) for _, i, _ in rows],
    )
    widest = max(block_grid(table.shape(i), DEFAULT_BLOCK).line for _, i, kind in rows if kind == SCALE)
    return QuantisedCheckpoint(
        path=checkpoint.path,
        folder=checkpoint.folder,
        parts=(checkpoint,),
        table=shown,
        metadata=checkpoint.metadata,
        out_dtypes=_out_dtypes(checkpoint, shown, rows),
        scratch_bytes=scratch_bytes_of(checkpoint) + STRIP_BYTES + (_KEPT_LINES + 4) * 4 * widest,
        inner=np.array([i for _, i, _ in rows], np.int64),
        kinds=np.array([kind for _, _, kind in rows], np.uint8),
    )


def _out_dtypes(
    checkpoint: Checkpoint, shown: TensorTable, rows: Sequence[tuple[str, int, int]]
) -> npt.NDArray[np.uint8]:
    """Weights and scales as they are, the others as a soup of the part would have them."""
    if not isinstance(checkpoint, DerivedCheckpoint):
        return shown.dtypes
    others = [int(checkpoint.out_dtypes[i]) if kind == OTHER else -1 for _, i, kind in rows]
    return np.where(np.array(others) < 0, shown.dtypes, others).astype(np.uint8)


def _is_linear(table: TensorTable, position: int) -> bool:
    name, shape = table.names[position], table.shape(position)
    return (
        name.endswith(".weight")
        and len(shape) == 2
        and min(shape) >= DEFAULT_BLOCK[0]
        and table.dtype(position).name in _SOURCES
        and layer_of(name) is not None
        and not _NOT_LINEAR.search(name)
    )


def _scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    grid = block_grid(shape, DEFAULT_BLOCK)
    return *shape[:-2], grid.lines, grid.line


def _refuse_unfit(checkpoint: Checkpoint, position: int, stored: Collection[str]) -> None:
    table = checkpoint.table
    name, shape, dtype = table.names[position], table.shape(position), table.dtype(position).name
    what = None
    if len(shape) not in (2, 3) or 0 in shape:
        what = f"has shape {shape}, but only matrices and stacks of them can be quantised in blocks"
    elif dtype not in _SOURCES:
        what = f"is {dtype}, but only {', '.join(_SOURCES)} can be quantised"
    elif name + SCALE_SUFFIXES[0] in stored:
        what = f"has a tensor {name}{SCALE_SUFFIXES[0]} beside it already"
    if what is not None:
        raise CheckpointError(f"{name}: in {checkpoint.path}, {what}. Leave it out.", path=checkpoint.path)


class QuantisedSource(Source):
    """Quantises weights a strip at a time, and finds the scales of a line of blocks before. See `Source`."""

    def __init__(self, checkpoint: QuantisedCheckpoint, part: PartReader) -> None:
        self._inner = checkpoint.inner
        self._kinds = checkpoint.kinds
        self._stored = checkpoint.parts[0].table
        self._part = part
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, int], npt.NDArray[np.float32]] = {}

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        inner, kind = int(self._inner[position]), int(self._kinds[position])
        if kind == OTHER:
            return self._part.source.fetch(inner, offset, nbytes, staging)
        assert staging is not None
        target, grid = address_of(staging), self._grid(inner)
        if kind == SCALE:
            self._write_scales(inner, grid, offset // 4, bytes_at(target, nbytes).view(np.float32))
        else:
            self._write_weights(inner, grid, offset, nbytes, target)
        return target

    def _grid(self, inner: int) -> Grid:
        return block_grid(self._stored.shape(inner), DEFAULT_BLOCK)

    def _write_scales(self, inner: int, grid: Grid, first: int, out: npt.NDArray[np.float32]) -> None:
        done = 0
        while done < len(out):
            line, column = divmod(first + done, grid.line)
            count = min(grid.line - column, len(out) - done)
            out[done : done + count] = self._scales(inner, grid, line)[column : column + count]
            done += count

    def _write_weights(self, inner: int, grid: Grid, first: int, count: int, target: int) -> None:
        dtype, end = self._stored.dtype(inner), first + count
        while first < end:
            line = grid.line_of(first)
            scales = self._scales(inner, grid, line)
            count = min(end, grid.first_of(line + 1), first + STRIP_BYTES // dtype.itemsize) - first
            with self._part.view(inner, first * dtype.itemsize, count * dtype.itemsize) as raw:
                block_scaled.quantise(
                    raw.ctypes.data, dtype.kernel_code, first, count, grid.sizes, scales.ctypes.data,
                    line * grid.line, target,
                )  # fmt: skip
            first, target = first + count, target + count

    def _scales(self, inner: int, grid: Grid, line: int) -> npt.NDArray[np.float32]:
        """Return the scales of a line of blocks, shape (blocks,); tiles that share a line mostly find them here."""
        kept = self._kept.get((inner, line))
        if kept is not None:
            return kept
        dtype, first, end = self._stored.dtype(inner), grid.first_of(line), grid.first_of(line + 1)
        found = np.zeros(grid.line, np.float32)
        step = STRIP_BYTES // dtype.itemsize
        for start in range(first, end, step):
            count = min(step, end - start)
            with self._part.view(inner, start * dtype.itemsize, count * dtype.itemsize) as raw:
                block_scaled.largest(
                    raw.ctypes.data, dtype.kernel_code, start, count, grid.sizes, found.ctypes.data, line * grid.line
                )
        scales = np.where(found == 0, np.float32(1), np.maximum(found / _LARGEST, _LEAST))
        scales[np.isnan(found)] = np.nan
        with self._lock:
            while len(self._kept) >= _KEPT_LINES:
                del self._kept[next(iter(self._kept))]
            self._kept[inner, line] = scales
        return scales

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        self._part.source.load(*self._place(position, offset, nbytes, whole=True))

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        self._part.source.drop(*self._place(position, offset, nbytes, whole=False))

    def _place(self, position: int, offset: int, nbytes: int, *, whole: bool) -> tuple[int, int, int]:
        """Say what is read of the part for some bytes of a tensor; `whole`: with all of the lines of blocks."""
        inner, kind = int(self._inner[position]), int(self._kinds[position])
        if kind == OTHER or not nbytes:
            return inner, offset, nbytes
        grid, itemsize = self._grid(inner), self._stored.dtype(inner).itemsize
        first, end = offset, offset + nbytes
        if kind == SCALE:
            first, end = (grid.first_of(s // grid.line) for s in (offset // 4, (offset + nbytes) // 4 - 1 + grid.line))
        elif whole:
            first, end = grid.first_of(grid.line_of(first)), grid.first_of(grid.line_of(end - 1) + 1)
        return inner, first * itemsize, (end - first) * itemsize

    def close(self) -> None:
        """See `Source`."""
        self._part.source.close()
