"""The loops of STREAM (McCalpin, 1995), compiled: what memory gives at best.

Bytes are counted as STREAM counts them: what the loop reads and writes by its formula, 16 an element for copy and
scale, 24 for add and triad. Where a store first fetches its cache line, memory moves more than that.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from functools import cache
from typing import Any

__all__ = ["STREAM_BYTES", "stream_loops"]

STREAM_BYTES = {"copy": 16, "scale": 16, "add": 24, "triad": 24, "read": 8}
"""Bytes an element of each loop, by STREAM's convention; `read` sums, and only reads."""


@cache
def stream_loops() -> dict[str, Any]:
    """Return the loops by name; each takes float64 arrays a, b, c of one shape (n,), and releases the GIL.

    ``copy``: c = a, ``scale``: b = 3 c, ``add``: c = a + b, ``triad``: a = b + 3 c.
    """
    import numba

    signature = numba.void(*(numba.types.Array(numba.f8, 1, "C"),) * 3)

    def compiled(function: Any) -> Any:
        return numba.njit(signature, nogil=True, cache=True, error_model="numpy")(function)

    @compiled
    def copy(a, b, c):
        for i in range(len(a)):
            c[i] = a[i]

    @compiled
    def scale(a, b, c):
        for i in range(len(a)):
            b[i] = 3.0 * c[i]

    @compiled
    def add(a, b, c):
        for i in range(len(a)):
            c[i] = a[i] + b[i]

    @compiled
    def triad(a, b, c):
        for i in range(len(a)):
            a[i] = b[i] + 3.0 * c[i]

    return {"copy": copy, "scale": scale, "add": add, "triad": triad}
