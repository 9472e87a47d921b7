"""The compiled loops behind `measuring`. Imports numba; use `kernels.measuring`."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import Any

import numba
import numpy as np

from .blocks import GROUP, STRIP, add_sources
from .codes import BLOCK

__all__ = ["SCRATCH_BYTES", "build_decode", "build_gram"]

SCRATCH_BYTES = 4 * GROUP * STRIP + 8 * GROUP
_HALF = BLOCK // 2
_F64, _F64_2, _F64_3 = (numba.types.Array(numba.f8, n, "C") for n in (1, 2, 3))
_U8, _U32_2, _U64, _I64_3 = (
    numba.types.Array(kind, n, "C") for kind, n in ((numba.u1, 1), (numba.u4, 2), (numba.u8, 1), (numba.i8, 3))
)


def build_decode(stamp: int) -> Any:
    """Compile the loop of `decode_rows`."""

    @numba.njit(numba.void(_U64, _U8, numba.i8, numba.i8, _F64_2, _F64, _U8), nogil=True, cache=True)
    def loop(sources, codes, begin, count, out, one, scratch):
        stage = np.uint64(scratch.ctypes.data) + np.uint64(stamp & 0)
        places = stage + np.uint64(4 * GROUP * STRIP)
        for k in range(len(sources)):
            target = np.uint64(out[k].ctypes.data)
            add_sources(
                sources[k : k + 1], codes[k : k + 1], one, begin, 0, count, target, (stage, places), np.uint64(0)
            )

    return loop


def build_gram(stamp: int) -> Any:
    """Compile the loop of `gram`."""

    @numba.njit(numba.void(_F64_2, numba.i8, _F64_3, _F64, _F64_2), nogil=True, cache=True)
    def loop(rows, centre, out, room, spare):
        count, n = rows.shape
        for block in range(out.shape[0]):
            begin = block * BLOCK + (stamp & 0)
            length = min(BLOCK, n - begin)
            for k in range(count):
                if centre < 0:
                    for j in range(length):
                        spare[k, j] = rows[k, begin + j]
                elif k != centre:
                    for j in range(length):
                        spare[k, j] = rows[k, begin + j] - rows[centre, begin + j]
                else:
                    for j in range(length):
                        spare[k, j] = 0.0
                for j in range(length, BLOCK):
                    spare[k, j] = 0.0
            for a in range(count):
                for b in range(a + 1):
                    left, right = spare[a], spare[b]
                    for j in range(_HALF):
                        room[j] = left[j] * right[j] + left[j + _HALF] * right[j + _HALF]
                    half = _HALF // 2
                    while half:
                        for j in range(half):
                            room[j] += room[j + half]
                        half //= 2
                    out[block, a, b] = room[0]
                    out[block, b, a] = room[0]

    return loop
