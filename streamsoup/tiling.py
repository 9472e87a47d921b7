"""How large a tile may be: from the budget to workers, groups and tile sizes. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamsoup.errors import BudgetError
from streamsoup.methods.protocol import TensorInfo
from streamsoup.units import format_binary

BLOCK_ELEMENTS = 2048  # the kernels' fixed unit; tiles are whole multiples of it
MIB = 1 << 20
# Interpreter objects, journal batches, the kernels' accumulators.
FIXED_BYTES = 6 * MIB
# A thread's stack is private writable memory, whether or not it is touched.
STACK_BYTES = 8 * MIB
# A partial sum between groups is the float64 accumulator itself.
PARTIAL_ITEMSIZE = 8
# Threads that read: a disk needs several requests in flight, and more than these only disturb its read-ahead.
READERS = 4
# Threads that read windows of maps ahead; the kernel keeps the disk busy for each.
LOADERS = 2


# Methods see a tile in pieces of about so many elements of all checkpoints: their arrays stay in the L2 cache.
PIECE_ELEMENTS = 256 * 1024
# Arrays of a piece that a method's functions may hold at a time.
_PIECE_ARRAYS = 6


def piece_elements(checkpoints: int, width: int | None = None) -> int:
    """Elements of a piece: whole blocks, a power of two of them; or, for a row of `width`, whole rows."""
    blocks = max(1, min(8, PIECE_ELEMENTS // checkpoints // BLOCK_ELEMENTS))
    whole = BLOCK_ELEMENTS << (blocks.bit_length() - 1)
    return whole if width is None else max(1, whole // width) * width


def piece_bytes(checkpoints: int, least: int = 0) -> int:
    """Bytes that a worker holds to measure or merge a piece, which may have to have so many elements at least."""
    return _PIECE_ARRAYS * 8 * (checkpoints + 1) * max(least, piece_elements(checkpoints))


def row_unit(tensor: TensorInfo) -> int:
    """Elements that are whole rows as well as whole blocks (but for the end of the tensor)."""
    whole = -(-max(tensor.elements, 1) // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
    return min(whole, math.lcm(max(tensor.width, 1), BLOCK_ELEMENTS))


@dataclass(frozen=True, slots=True)
class TileNeeds:
    """What one tile needs, for each element.

    Attributes
    ----------
    ingredients : int
    in_itemsize, out_itemsize : int
        Widest bytes an element of an ingredient, and of the output.
    staged : bool
        Whether ingredients are read into buffers of ours (and not through a map).
    largest_elements : int
        Elements of the largest tensor.
    ahead : bool
        Whether maps are read ahead.
    reserved_bytes : int
        Owned all the time beside tiles: a running sum in memory.
    buffer_itemsize : int
        Bytes an element of a buffer that a source keeps for each worker: a running sum on disk is read into one.
    held_bytes : int
        Held for each worker beside the tile: what a method's functions and measurements take.
    least_elements : int
        Tiles are not smaller (but whole tensors are): for a method that must see whole rows.
    whole_tensors : bool
        Whether tensors are gone through several times: what is read into a buffer is read once only if a tile holds it.
    groupable : bool
        Whether ingredients may go through in groups. Double-double sums may not: between groups they would be kept
        unscaled, and what overflows or underflows there would be lost.
    wide : bool
        Whether some sums are double-double.
    locked : bool
        Whether a device reads the buffers: they are page-locked, their sizes powers of two, and partial sums stay
        on the device.
    readers : int
        Threads that bring bytes into buffers, where there are several slots.
    engines : int
        Engines that use a device at the same time.
    """

    ingredients: int
    in_itemsize: int
    out_itemsize: int
    staged: bool
    largest_elements: int
    ahead: bool = False
    reserved_bytes: int = 0
    buffer_itemsize: int = 0
    held_bytes: int = 0
    least_elements: int = 0
    whole_tensors: bool = False
    groupable: bool = True
    wide: bool = False
    locked: bool = False
    readers: int = READERS
    engines: int = 1


@dataclass(frozen=True, slots=True)
class Tiling:
    """The sizes that a run works with.

    Attributes
    ----------
    workers : int
        Threads, each with one slot.
    tile_elements : int
        A multiple of `BLOCK_ELEMENTS`.
    group : int
        How many ingredients go through a slot at a time; fewer than all means that partial sums are kept.
    slot_bytes : int
    readers : int
        Threads that bring bytes into slots, beside the workers; 0 where none are needed.
    loaders : int
        Threads that bring bytes into the page cache.
    reserved_bytes : int
        Owned all the time beside that: a running sum in memory.
    """

    workers: int
    tile_elements: int
    group: int
    slot_bytes: int
    readers: int = 0
    loaders: int = 0
    reserved_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Projected bytes that the engine owns while it runs."""
        threads = (self.workers + self.readers + self.loaders) * STACK_BYTES
        return self.reserved_bytes + FIXED_BYTES + threads + self.workers * self.slot_bytes


def locked_bytes(nbytes: int) -> int:
    """Bytes of a page-locked buffer: torch's allocator rounds them up to a power of two, and to whole pages."""
    return 1 << max(12, (nbytes - 1).bit_length())


def found_bytes(ingredients: int) -> int:
    """Bytes of what a device finds out about a tile: two numbers for each ingredient, and one of the result."""
    return 8 * (2 * ingredients + 1)


def slot_bytes(needs: TileNeeds, tile_elements: int, group: int) -> int:
    """Bytes of one slot: staged ingredients, the output tile, a source's buffer, partial sums between groups."""
    if needs.locked:
        tiles = group * locked_bytes(tile_elements * needs.in_itemsize) + locked_bytes(
            tile_elements * needs.out_itemsize
        )
        return tiles + locked_bytes(found_bytes(needs.ingredients)) + needs.held_bytes
    staged = group * needs.in_itemsize if needs.staged else 0
    partial = PARTIAL_ITEMSIZE if group < needs.ingredients else 0
    return tile_elements * (staged + needs.out_itemsize + partial + needs.buffer_itemsize) + needs.held_bytes


def choose_tiling(needs: TileNeeds, *, budget_bytes: int, workers: int) -> Tiling:
    """Choose the largest tiles that fit; then fewer workers, smaller tiles, at last groups of ingredients.

    Raises
    ------
    BudgetError
        With the least budget that would do.
    """
    whole = -(-max(needs.largest_elements, 1) // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
    least = min(needs.least_elements, whole)
    preferences = _preferences(workers)
    if needs.whole_tensors and needs.staged:
        preferences = _whole_tensors(whole, workers) + preferences
    for tile_elements, threads in preferences:
        tiling = _fit(needs, max(least, min(tile_elements, whole)), needs.ingredients, threads)
        if tiling.peak_bytes <= budget_bytes:
            return tiling
    smallest = [_fit(needs, max(least, min(t, whole)), g, 1) for t, g in _last_resorts(needs)]
    for tiling in smallest:
        if tiling.peak_bytes <= budget_bytes:
            return tiling
    needed = -(-min(tiling.peak_bytes for tiling in smallest) // MIB) * MIB
    raise BudgetError(
        f"A budget of {format_binary(budget_bytes)} is too small: the least that would do here is "
        f"{format_binary(needed)}. Give --budget {format_binary(needed).replace(' ', '')}.",
        least_bytes=needed,
    )


def _preferences(workers: int) -> list[tuple[int, int]]:
    """Pairs of tile size and workers, best first: large tiles, then all workers, then what is left."""
    counts = sorted({workers, max(1, workers // 2), max(1, workers // 4), 1}, reverse=True)
    large = [(k * 1024, n) for k in (1024, 512, 256) for n in counts[:1]]
    fewer = [(k * 1024, n) for n in counts for k in (256, 128, 64)]
    small = [(k * 1024, n) for n in counts for k in (32, 16)]
    return large + fewer + small


def _whole_tensors(whole: int, workers: int) -> list[tuple[int, int]]:
    """Pairs of tile size and workers where buffers had better hold whole tensors, at the price of half the threads."""
    return [(whole, n) for n in sorted({workers, max(1, workers // 2)}, reverse=True) if n > 1 or workers == 1]


def _last_resorts(needs: TileNeeds) -> list[tuple[int, int]]:
    """Pairs of tile size and group, best first."""
    if not needs.groupable:
        # A method's measurements want whole pieces: eight blocks.
        return [(k * BLOCK_ELEMENTS, needs.ingredients) for k in ((8,) if needs.held_bytes else (4, 2, 1))]
    groups = [needs.ingredients]
    while groups[-1] > 1:
        groups.append(-(-groups[-1] // 2))
    return [(tile, group) for tile in (64 * 1024, 16 * 1024, 4 * BLOCK_ELEMENTS) for group in groups]


def _fit(needs: TileNeeds, tile_elements: int, group: int, workers: int) -> Tiling:
    # With one worker and one slot there is little to read ahead of: a small budget is better spent on the slot.
    readers = needs.readers if needs.staged and workers > 1 else 0
    loaders = LOADERS if needs.ahead and workers > 1 else 0
    slot = slot_bytes(needs, tile_elements, group)
    return Tiling(workers, tile_elements, group, slot, readers, loaders, needs.reserved_bytes)
