"""The CPU backend: numba kernels over raw addresses, on the worker's own thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.backends import merging
from streamsoup.backends.protocol import Blend, Combined, Finished, Portion, Token
from streamsoup.backends.tracing import Program, trace
from streamsoup.device_share import DeviceShare
from streamsoup.errors import RecipeError
from streamsoup.kernels import codes, measuring
from streamsoup.kernels import combine as kernels
from streamsoup.kernels.vector_machine import Stretch
from streamsoup.maps import address_of
from streamsoup.measurement import Part, SurveyPart
from streamsoup.methods.protocol import Elementwise
from streamsoup.tiling import BLOCK_ELEMENTS, PARTIAL_ITEMSIZE, TileNeeds, Tiling


class CpuSlot:
    """See `Slot`.

    Notes
    -----
    Memory: the bytes of `streamsoup.tiling.slot_bytes`. Buffers are reused: first touch of fresh memory runs at a
    tenth of the speed of the second.
    """

    def __init__(self, tiling: Tiling, needs: TileNeeds) -> None:
        tile, ingredients = tiling.tile_elements, needs.ingredients
        stride = tile * needs.in_itemsize
        self._staging = [np.empty(stride, np.uint8) for _ in range(tiling.group)] if needs.staged else None
        self._output = np.empty(tile * needs.out_itemsize, np.uint8)
        grouped = tiling.group < ingredients
        self._partial = np.empty(tile * PARTIAL_ITEMSIZE, np.uint8) if grouped else None
        self._digests = np.zeros(ingredients, np.uint64)
        self._nonfinite = np.zeros(ingredients, np.int64)
        self._overflowed = 0

    @property
    def device(self) -> None:
        """See `Slot`."""
        return None

    def staging(self, index: int, nbytes: int) -> memoryview | None:
        """See `Slot`."""
        return None if self._staging is None else self._staging[index][:nbytes].data

    def buffer(self, index: int, nbytes: int) -> None:
        """See `Slot`."""
        return

    def output(self, nbytes: int) -> memoryview:
        """See `Slot`."""
        return self._output[:nbytes].data

    def combine(
        self,
        addresses: Sequence[int],
        blend: Blend,
        first: int,
        elements: int,
        first_block: int,
        into: memoryview | None = None,
    ) -> Token | None:
        """See `Slot`."""
        stop = first + len(addresses)
        last = stop == len(blend.weights)
        if first == 0:
            self._digests[:] = 0
            self._nonfinite[:] = 0
            self._overflowed = 0
        output = into if into is not None else self.output(elements * blend.out_itemsize)
        group = _Group.of(blend, addresses, first, self._partial if first else None)
        # An element that overflowed in an earlier group is not counted again: its partial sum is no longer finite.
        self._overflowed += group.combine(
            blend,
            elements,
            first_block,
            out=output if last else self._partial.data if self._partial is not None else None,
            last=last,
            digests=self._digests[first:stop],
            nonfinite=self._nonfinite[first:stop],
        )
        if not last:
            return None
        return Finished(Combined(output, self._digests, self._nonfinite, self._overflowed))

    def look(self, addresses: Sequence[int], blend: Blend, portion: Portion, part: Part) -> None:
        """See `Slot`."""
        merging.look(_CpuTile(addresses, portion, blend), part)

    def merge(
        self,
        addresses: Sequence[int],
        blend: Blend,
        portion: Portion,
        rule: Elementwise,
        into: memoryview | None = None,
    ) -> Token:
        """See `Slot`."""
        output = into if into is not None else self.output(portion.elements * blend.out_itemsize)
        return Finished(merging.merge(_CpuTile(addresses, portion, blend), rule, output))


class _CpuTile:
    """See `merging.DeviceTile`."""

    longest_look = None

    def __init__(self, addresses: Sequence[int], portion: Portion, blend: Blend) -> None:
        self.portion = portion
        self.blend = blend
        self._addresses = np.array(addresses, np.uint64)

    def _stretch(self, begin: int, count: int) -> Stretch:
        return Stretch(self._addresses, self.blend.codes, begin, count, self.portion.start + begin)

    def _trace(self, function: Callable[[Any], Any]) -> Program:
        return trace(function, self.portion.tensor, len(self._addresses))

    def _decoded(self, begin: int, count: int) -> npt.NDArray[np.float64]:
        rows = np.empty((len(self._addresses), count))
        measuring.decode_rows(self._addresses, self.blend.codes, begin, count, rows)
        return rows

    def gram(self, begin: int, count: int, centre: int | None) -> npt.NDArray[np.float64]:
        """See `Looks`."""
        found: npt.NDArray[np.float64] = measuring.gram(self._decoded(begin, count), centre)
        return found

    def products(self, begin: int, count: int) -> npt.NDArray[np.float64]:
        """See `Looks`."""
        found: npt.NDArray[np.float64] = measuring.products(self._addresses, self.blend.codes, begin, count)
        return found

    def sums(self, begin: int, count: int, function: Callable[[Any], Any]) -> npt.NDArray[np.float64]:
        """See `Looks`."""
        return self._trace(function).to_sums(self._stretch(begin, count))

    def counts(
        self, begin: int, count: int, function: Callable[[Any], Any], number: int, prefixes: npt.NDArray[np.uint32]
    ) -> npt.NDArray[np.int64]:
        """See `Looks`."""
        return self._trace(function).to_counts(self._stretch(begin, count), number, prefixes)

    def merge(
        self, begin: int, count: int, function: Callable[[Any], Any], out: memoryview
    ) -> tuple[npt.NDArray[np.int64], int]:
        """See `DeviceTile`."""
        (result,), bad = self._trace(function).to_rows(self._stretch(begin, count))
        unused = np.zeros(1, np.uint64)
        source = np.array([result.ctypes.data], np.uint64), np.array([codes.F64], np.uint8), np.ones(1)
        place = (count, 0, address_of(out), self.blend.out_code, np.zeros(1, np.uint8), unused, np.zeros(1, np.int64))
        too_large = int(kernels.combine(*source, 1.0, *place))
        if bad[-1]:
            finite = np.isfinite(self._decoded(begin, count)).all(axis=0)
            too_large += int((~np.isfinite(result) & finite).sum())
        return bad[:-1], too_large

    def survey(self, begin: int, count: int, part: SurveyPart) -> npt.NDArray[np.float64]:
        """See `DeviceTile`."""
        first = (self.portion.start + begin) // BLOCK_ELEMENTS
        found: npt.NDArray[np.float64] = measuring.survey(
            self._addresses, self.blend.codes, begin, count, first,
            based=part.based, digests=part.digests, nonfinite=part.nonfinite,
        )  # fmt: skip
        return found

    def digests(self) -> npt.NDArray[np.uint64]:
        """See `DeviceTile`."""
        elements, first = self.portion.elements, self.portion.start // BLOCK_ELEMENTS
        sizes, hashed = self.blend.itemsizes, self.blend.hashed
        return np.array(
            [
                kernels.digest(address, elements * size, size, first) if wanted else 0
                for address, size, wanted in zip(self._addresses.tolist(), sizes, hashed, strict=True)
            ],
            np.uint64,
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """The sources of one kernel call: a group of ingredients, after the partial sum of those before them."""

    sources: npt.NDArray[np.uint64]
    codes: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float64]
    hashed: npt.NDArray[np.uint8]
    carried: int

    @staticmethod
    def of(blend: Blend, addresses: Sequence[int], first: int, partial: npt.NDArray[np.uint8] | None) -> _Group:
        stop = first + len(addresses)
        sources = np.array(addresses, np.uint64)
        kinds, weights = blend.codes[first:stop], blend.weights[first:stop]
        hashed = blend.hashed[first:stop]
        if partial is None:
            return _Group(sources, kinds, weights, hashed, 0)
        return _Group(
            np.concatenate([np.array([partial.ctypes.data], np.uint64), sources]),
            np.concatenate([np.array([codes.F64], np.uint8), kinds]),
            np.concatenate([np.ones(1), weights]),
            np.concatenate([np.zeros(1, np.uint8), hashed]),
            1,
        )

    def combine(
        self,
        blend: Blend,
        elements: int,
        first_block: int,
        *,
        out: memoryview | None,
        last: bool,
        digests: npt.NDArray[np.uint64],
        nonfinite: npt.NDArray[np.int64],
    ) -> int:
        assert out is not None
        out_code = blend.out_code if last else codes.F64
        divisor = blend.divisor if last else (1.0, 0.0)
        found_digests = np.zeros(len(self.sources), np.uint64)
        found_nonfinite = np.zeros(len(self.sources), np.int64)
        place = (
            elements,
            first_block,
            address_of(out),
            out_code,
            self.hashed,
            found_digests,
            found_nonfinite,
        )
        if blend.wide:
            overflowed = kernels.combine_wide(self.sources, self.codes, self.weights, *divisor, *place)
        else:
            function = kernels.combine_single if blend.single else kernels.combine
            overflowed = function(self.sources, self.codes, self.weights, divisor[0], *place)
        digests += found_digests[self.carried :]
        nonfinite += found_nonfinite[self.carried :]
        return int(overflowed)


class CpuBackend:
    """See `Backend`."""

    name = "cpu"

    def prepare(
        self, *, wide: bool, fp8: bool, single: bool = False, measured: bool = False, surveyed: bool = False
    ) -> None:
        """See `Backend`. Compiling takes seconds the first time; later the kernels come from numba's cache."""
        if measured:
            measuring.prepare()
        if surveyed:
            measuring.prepare_survey()
        code = codes.F8_E4M3 if fp8 else codes.BF16
        one = np.zeros(8, np.uint8)
        for is_wide, is_single in {(False, False), (wide, False), (False, single)}:
            blend = Blend(
                np.array([code], np.uint8),
                (1,),
                np.ones(1),
                (1.0, 0.0),
                np.ones(1, np.uint8),
                code,
                codes.ITEMSIZE[code],
                is_wide,
                is_single,
            )
            tiling = Tiling(1, 1, 1, 0)
            slot = CpuSlot(tiling, TileNeeds(1, 8, 8, staged=False, largest_elements=1))
            slot.combine([one.ctypes.data], blend, 0, 1, 0)
        kernels.digest(one.ctypes.data, 8, 8, 0)

    def shares(self, tiling: Tiling, needs: TileNeeds) -> tuple[DeviceShare, ...]:
        """See `Backend`."""
        return ()

    def slot(self, tiling: Tiling, needs: TileNeeds) -> CpuSlot:
        """See `Backend`."""
        return CpuSlot(tiling, needs)

    bytes_to_hold = 0

    def hold(self, nbytes: int) -> Any:
        """See `Backend`."""
        raise RecipeError("sums: the cpu has no memory but the host's. Give --sums host, or --device cuda.")

    def digest(self, address: int, nbytes: int, itemsize: int, first_block: int) -> int:
        """See `Backend`."""
        return int(kernels.digest(address, nbytes, itemsize, first_block))
