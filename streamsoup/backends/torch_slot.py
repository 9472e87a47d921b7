"""A slot on a device of torch: buffers on both sides, and tiles that go up, are combined and come down in pieces.

The host waits for nothing but the end of its own slot's tile (and, between groups of ingredients, for the copies that
still read the buffers that are to be filled again).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from streamsoup.backends import merging
from streamsoup.backends.lanes import Lane, Lanes
from streamsoup.backends.protocol import Blend, Combined, Finished, Place, Portion, Room, Token
from streamsoup.backends.torch_group import Group, combine_into
from streamsoup.backends.torch_tile import TorchTile
from streamsoup.device_share import DeviceShare
from streamsoup.errors import DeviceMemoryError
from streamsoup.measurement import Part
from streamsoup.methods.protocol import Elementwise
from streamsoup.tiling import BLOCK_ELEMENTS, PARTIAL_ITEMSIZE, TileNeeds, Tiling, found_bytes, locked_bytes
from streamsoup.units import format_binary

T = TypeVar("T")
# Of each operand, the tile's bytes where they lie on the device; None: they come from a buffer of the slot.
Held: TypeAlias = Sequence[torch.Tensor | None]


class TorchToken:
    """See `Token`: waits for one event, behind the last of its slot's results."""

    def __init__(self, slot: TorchSlot, nbytes: int, into: Room | None) -> None:
        self._slot = slot
        self._nbytes = nbytes
        self._into = into

    def result(self) -> Combined:
        """See `Token`."""
        slot = self._slot
        slot.down.wait()
        if isinstance(self._into, torch.Tensor):
            return Combined(memoryview(b""), *slot.found())
        output = slot.output(self._nbytes)
        if self._into is not None:
            np.frombuffer(self._into, np.uint8)[:] = np.frombuffer(output, np.uint8)
            output = self._into
        return Combined(output, *slot.found())


class TorchSlot:
    """See `Slot`.

    Parameters
    ----------
    lanes : Lanes
    share : DeviceShare
    tiling : Tiling
    needs : TileNeeds

    Attributes
    ----------
    lanes : Lanes
    up, ran, down : Mark
        Behind the last work of the slot on each lane.
    host_bytes, device_bytes : int
        What was allocated.

    Notes
    -----
    Memory: on the host the bytes of `streamsoup.tiling.slot_bytes`, page-locked; on the device those of
    `streamsoup.device_share`. All of it is allocated once. A buffer is written again when the lane that writes it has
    waited for the lane that read it; those of the host, when the host has waited.
    """

    def __init__(self, lanes: Lanes, share: DeviceShare, tiling: Tiling, needs: TileNeeds) -> None:
        tile, ingredients = tiling.tile_elements, needs.ingredients
        self.lanes = lanes
        self.up, self.ran, self.down = (lanes.mark() for _ in range(3))
        self.host_bytes = self.device_bytes = 0
        self._share = share
        self._tiling = tiling
        self._needs = needs
        self._staging = [self._locked(tile * needs.in_itemsize) for _ in range(tiling.group)]
        self._output = self._locked(tile * needs.out_itemsize)
        numbers = found_bytes(ingredients)
        self._found_here = self._locked(numbers)[:numbers].view(torch.int64)
        self._allocate(share.piece_elements, numbers)
        lanes.follow_caller()
        self._window: tuple[int, int] | None = None
        self._is_read = False

    def _locked(self, nbytes: int) -> torch.Tensor:
        size = locked_bytes(nbytes)
        self.host_bytes += size
        return self.lanes.host(size)

    def _allocate(self, piece: int, numbers: int) -> None:
        """Allocate what is held on the device: for smaller pieces, if there is no room."""
        needs, tiling = self._needs, self._tiling
        grouped = tiling.group < needs.ingredients
        sizes = piece * needs.in_itemsize, piece * needs.out_itemsize
        try:
            self._sources = [self.lanes.memory(sizes[0]) for _ in range(tiling.group)]
            self._result = self.lanes.memory(sizes[1])
            self._partial = self.lanes.memory(tiling.tile_elements * PARTIAL_ITEMSIZE) if grouped else None
            self._found = self.lanes.memory(numbers).view(torch.int64)
        except torch.OutOfMemoryError:
            self._sources, self._result = [], torch.empty(0)
            self._partial = None
        else:
            self._piece = self._step = piece
            buffers = [*self._sources, self._result, self._found, *([] if self._partial is None else [self._partial])]
            self.device_bytes = sum(buffer.nbytes for buffer in buffers)
            # The allocator may hand out memory that earlier arithmetic still uses: only that lane is behind it.
            self.lanes.put(Lane.RUN, _nothing, then=self.ran)
            return
        self.lanes.release()
        least = self._share.least_elements
        if piece <= least:
            raise self._no_memory(tiling.group * sizes[0] + sizes[1])
        self._allocate(max(least, piece // 2 // BLOCK_ELEMENTS * BLOCK_ELEMENTS), numbers)

    def _no_memory(self, wanted_bytes: int) -> DeviceMemoryError:
        return DeviceMemoryError(
            f"device {self._share.device}: {format_binary(wanted_bytes)} of its memory cannot be had, and less will "
            "not do. Others may use it: free it, or give a smaller --device-budget, fewer --threads, or --device cpu.",
            device=self._share.device,
            wanted_bytes=wanted_bytes,
        )

    @property
    def device(self) -> torch.device:
        """See `Slot`."""
        return self.lanes.device

    def staging(self, index: int, nbytes: int) -> memoryview | None:
        """See `Slot`. Between groups it waits until the buffers were copied; a tile that is done is waited for."""
        if self._is_read:
            self.up.wait()
        self._window = None
        return self._staging[index][:nbytes].numpy().data

    def buffer(self, index: int, nbytes: int) -> torch.Tensor | None:
        """See `Slot`. Between groups it waits until the buffer was computed with."""
        if self._is_read:
            self.ran.wait()
        self._window = None
        buffer = self._sources[index]
        return buffer[:nbytes] if nbytes <= len(buffer) else None

    def output(self, nbytes: int) -> memoryview:
        """See `Slot`."""
        return self._output[:nbytes].numpy().data

    def found(self) -> tuple[Any, Any, int]:
        """Return digests, counts and overflows that came down with a tile."""
        found, count = self._found_here.numpy(), self._needs.ingredients
        return found[:count].view(np.uint64), found[count : 2 * count], int(found[-1])

    def combine(
        self,
        addresses: Sequence[Place],
        blend: Blend,
        first: int,
        elements: int,
        first_block: int,
        into: Room | None = None,
    ) -> Token | None:
        """See `Slot`. What is on the device is used there; the rest is taken from the staging buffers."""
        group = Group.of(blend, first, first + len(addresses))
        held = held_of(addresses)
        target = into if group.is_last and isinstance(into, torch.Tensor) else None
        for begin in range(0, elements, self._piece):
            count = min(self._piece, elements - begin)
            if self._window != (begin, begin + count):  # else it was looked at before, and is still there
                self._window = None
                self._lift(held, group.itemsizes, begin, count)
            self._reduce(group, held, target, begin, count, first_block + begin // BLOCK_ELEMENTS)
            if group.is_last:
                self._lower(group, begin, count, brings=target is None, is_end=begin + count == elements)
        self._window, self._is_read = None, not group.is_last
        return TorchToken(self, elements * blend.out_itemsize, into) if group.is_last else None

    def _lift(self, held: Held, itemsizes: Sequence[int], begin: int, count: int) -> None:
        """Copy elements of the tile up, when what is there was computed with."""

        def work() -> None:
            buffers = zip(self._staging, self._sources, held, itemsizes, strict=False)
            for here, there, is_there, size in buffers:
                if is_there is None:
                    there[: count * size].copy_(here[begin * size : (begin + count) * size], non_blocking=True)

        self.lanes.put(Lane.UP, work, after=(self.ran,), then=self.up)

    def _reduce(
        self, group: Group, held: Held, target: torch.Tensor | None, begin: int, count: int, first_block: int
    ) -> None:
        """Combine what was copied up, when what was there of results has come down."""

        def work() -> None:
            if group.first == 0 and begin == 0:
                self._found.zero_()
            at = 0
            while at < count:
                here = min(self._step, count - at)
                with self.lanes.turn:
                    done = self._try(group, held, target, begin, at, here, first_block + at // BLOCK_ELEMENTS)
                if done:
                    at += here
                else:
                    self._make_smaller(group, here)

        self.lanes.put(Lane.RUN, work, after=(self.up, self.down), then=self.ran)

    def _try(
        self,
        group: Group,
        held: Held,
        target: torch.Tensor | None,
        begin: int,
        at: int,
        count: int,
        first_block: int,
    ) -> bool:
        """Combine elements from `at` of the piece that begins at `begin`; False if the device has no memory for it."""
        sources = self._found_on_device(held, group.itemsizes, begin, at, count)
        size, out, place = group.out_itemsize, self._result, at
        if target is not None:
            out, place = target, begin + at
        partial = self._partial
        if partial is not None:
            carried = partial[(begin + at) * PARTIAL_ITEMSIZE : (begin + at + count) * PARTIAL_ITEMSIZE]
            sources = [carried] * group.carried + sources
            if not group.is_last:
                out, place = partial, begin + at
        try:
            digests, nonfinite, overflowed = combine_into(
                out[place * size : (place + count) * size], sources, group, first_block
            )
        except torch.OutOfMemoryError:
            return False
        total, number = self._needs.ingredients, group.carried
        self._found[group.first : group.stop] += digests[number:]
        self._found[total + group.first : total + group.stop] += nonfinite[number:]
        # An element that overflowed in an earlier group is not counted again: its partial sum is no longer finite.
        self._found[-1] += overflowed
        return True

    def _found_on_device(
        self, held: Held, itemsizes: Sequence[int], begin: int, at: int, count: int
    ) -> list[torch.Tensor]:
        """Return elements from `at` of the piece that begins at `begin`: of its copies, or where they lie."""
        found = []
        for there, is_there, size in zip(self._sources, held, itemsizes, strict=False):
            whole, first = (there, at) if is_there is None else (is_there, begin + at)
            found.append(whole[first * size : (first + count) * size])
        return found

    def _make_smaller(self, group: Group, count: int) -> None:
        """Compute with half as many elements at a time from now on."""
        self.lanes.release()
        blocks = -(-count // BLOCK_ELEMENTS)
        if blocks == 1:
            raise self._no_memory(count * 8 * len(group.codes))
        self._step = blocks // 2 * BLOCK_ELEMENTS

    def _lower(self, group: Group, begin: int, count: int, *, brings: bool, is_end: bool) -> None:
        """Copy results down, unless they stay; at the end of the tile, what was found, too."""
        size = group.out_itemsize

        def work() -> None:
            if brings:
                here = self._output[begin * size : (begin + count) * size]
                here.copy_(self._result[: count * size], non_blocking=True)
            if is_end:
                self._found_here.copy_(self._found, non_blocking=True)

        self.lanes.put(Lane.DOWN, work, after=(self.ran,), then=self.down)

    def look(self, addresses: Sequence[Place], blend: Blend, portion: Portion, part: Part) -> None:
        """See `Slot`."""
        merging.look(TorchTile(self, held_of(addresses), blend, portion), part)

    def merge(
        self,
        addresses: Sequence[Place],
        blend: Blend,
        portion: Portion,
        rule: Elementwise,
        into: Room | None = None,
    ) -> Token:
        """See `Slot`."""
        target = into if isinstance(into, torch.Tensor) else None
        nbytes = portion.elements * blend.out_itemsize
        output = self.output(nbytes) if into is None or target is not None else into
        combined = merging.merge(TorchTile(self, held_of(addresses), blend, portion), rule, output)
        if target is not None:
            here = self._output[:nbytes]
            self.lanes.put(Lane.UP, lambda: _copy(target, here), after=(self.ran,), then=self.up)
            self.up.wait()
        return Finished(combined)

    @property
    def most_elements(self) -> int:
        """Elements of all sources that are on the device at a time."""
        return self._piece

    def bring(self, held: Held, itemsizes: Sequence[int], elements: int, begin: int, count: int) -> list[torch.Tensor]:
        """Return some elements of all sources on the device, copying them up (and those behind) unless they are there.

        Parameters
        ----------
        held : sequence of Tensor or None
            Of each source, the tile's bytes where they lie on the device.
        itemsizes : sequence of int
        elements : int
            Of the tile.
        begin, count : int
        """
        if self._window is None or not self._window[0] <= begin <= begin + count <= self._window[1]:
            stop = min(elements, begin + self._piece)
            if begin + count > stop:
                raise self._no_memory(count * sum(itemsizes))
            self._lift(held, itemsizes, begin, stop - begin)
            self._window = begin, stop
        return self._found_on_device(held, itemsizes, self._window[0], begin - self._window[0], count)

    def compute(self, function: Callable[[], T]) -> T:
        """Call a function when what was brought is there, and wait for what it returns."""
        found: list[T] = []

        def attempt() -> bool:
            try:
                found.append(function())
            except torch.OutOfMemoryError:
                return False
            return True

        def work() -> None:
            if not attempt():
                self.lanes.release()
                if not attempt():
                    raise self._no_memory(self._needs.held_bytes)

        self.lanes.put(Lane.RUN, work, after=(self.up,), then=self.ran)
        self.ran.wait()
        return found[0]


def held_of(addresses: Sequence[Place]) -> Held:
    """Tell which operands lie on the device."""
    return [place if isinstance(place, torch.Tensor) else None for place in addresses]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _nothing() -> None:
    """Work that only has a place."""
