"""When is a running sum the same, bit for bit, whatever was added and removed on the way?

If every term is a multiple of 2^u and the magnitudes of all terms add up to at most 2^(53+u), every partial sum in any
order is a multiple of 2^u below 2^(53+u): a float64, exactly. Then adding and removing leave no trace.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import TensorTable
from streamsoup.dtypes import DTYPES
from streamsoup.maps import bytes_at
from streamsoup.source import Source

_UNKNOWN = 5000  # beyond any exponent
_PLAIN_ABOVE = 400
_PLAIN_UNIT = -500  # of elements that are at least 2^-448


@dataclass(frozen=True)
class Extent:
    """Bounds of an ingredient's magnitudes, shape (tensors,): elements are below 2^above, and multiples of 2^unit."""

    above: npt.NDArray[np.int32]
    unit: npt.NDArray[np.int32]
    negative_zero: npt.NDArray[np.bool_]


class MeasuringSource(Source):
    """Passes an ingredient's bytes on and notes the extent of each tensor. See `Source`."""

    def __init__(self, source: Source, table: TensorTable) -> None:
        self._source = source
        self._table = table
        self._lock = threading.Lock()
        self.extent = Extent(
            np.full(len(table), -5000, np.int32), np.full(len(table), 5000, np.int32), np.zeros(len(table), np.bool_)
        )

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        from streamsoup.kernels.extent import extent

        address = self._source.fetch(position, offset, nbytes, staging)
        code = DTYPES[int(self._table.dtypes[position])].kernel_code
        if code >= 0:
            above, unit, negative = extent(bytes_at(address, nbytes), code)
            with self._lock:  # two tiles of one tensor may be at work at once
                self.extent.above[position] = max(self.extent.above[position], above)
                self.extent.unit[position] = min(self.extent.unit[position], unit)
                self.extent.negative_zero[position] |= negative
        return address

    def resident(self, position: int, offset: int, nbytes: int, device: Any) -> Any | None:
        """See `Source`; what stays on a device is not measured, and so is never proved exact."""
        there = self._source.resident(position, offset, nbytes, device)
        if there is not None:
            self.extent.above[position] = _UNKNOWN
        return there

    def load(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        self._source.load(position, offset, nbytes)

    def drop(self, position: int, offset: int, nbytes: int) -> None:
        """See `Source`."""
        self._source.drop(position, offset, nbytes)

    def close(self) -> None:
        """See `Source`."""
        self._source.close()


@dataclass(frozen=True, slots=True)
class Entered:
    """With which weights an ingredient ever entered: the largest magnitude, and the lowest bit of any, 2^lowest."""

    largest: float
    lowest: int

    @staticmethod
    def of(*weights: float) -> Entered:
        """Gather weights."""
        return Entered(max(map(abs, weights)), min(map(_lowest_bit, weights)))

    def also(self, *weights: float) -> Entered:
        """Gather more weights."""
        more = Entered.of(*weights)
        return Entered(max(self.largest, more.largest), min(self.lowest, more.lowest))


def is_exact(
    terms: Mapping[str, Entered],
    extents: Mapping[str, Extent],
    *,
    digits: int,
    only: npt.NDArray[np.bool_] | slice = slice(None),
) -> bool:
    """Whether sums of these terms are exact in any order, in a format of so many significant bits.

    Where an ingredient has −0.0 they are not: a sum that passed through another number comes back as +0.0.

    Parameters
    ----------
    terms : mapping of path to Entered
    extents : mapping of path to Extent
    digits : int
        53 for float64, 24 for float32.
    only : bool array, shape (tensors,), optional
        The tensors that matter.
    """
    if any(path not in extents for path in terms):
        return False
    total: npt.NDArray[np.float64] | float = 0.0
    unit: npt.NDArray[np.float64] | float = np.inf
    for path, entered in terms.items():
        above, smallest = extents[path].above[only], extents[path].unit[only]
        if extents[path].negative_zero[only].any() or (above > 1000).any():
            return False
        total = total + entered.largest * np.exp2(np.clip(above, -1100, 1020).astype(np.float64))
        unit = np.minimum(unit, smallest + float(entered.lowest))
    with np.errstate(over="ignore", divide="ignore"):
        return bool(np.all(np.log2(np.maximum(total, 1e-300)) <= unit + digits - 1e-9))


def is_plain(paths: Iterable[str], extents: Mapping[str, Extent]) -> bool:
    """Whether double-double sums of these ingredients can be kept between two runs.

    The kernel scales elements beyond 2^±500 while it adds them; a sum that is kept is not scaled, and what overflows or
    underflows in its low half is lost.
    """
    return all(
        path in extents
        and bool(np.all(extents[path].above <= _PLAIN_ABOVE))
        and bool(np.all(extents[path].unit >= _PLAIN_UNIT))
        for path in paths
    )


def _lowest_bit(weight: float) -> int:
    """Return e such that the weight is an odd multiple of 2^e."""
    numerator, denominator = abs(weight).as_integer_ratio()
    if numerator == 0:
        return 0
    return int(math.log2(numerator & -numerator)) - denominator.bit_length() + 1
