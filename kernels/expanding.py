"""Decode 8-bit floats to float32, exactly, as an LLVM vector loop: no table, 8 elements at a time.

The exponent and mantissa go where float32 has them, and a multiplication by a power of two corrects the bias, for
subnormals too.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .codes import F8_E5M2, NONFINITE_MASK, NONFINITE_VALUE
from .fp8 import FORMATS
from .vectors import F32, I8, I32, I64, constant, load, splat, store, vector

__all__ = ["expand_f8"]

_CODES = sorted(FORMATS)
_SHIFTS = np.array([23 - FORMATS[code].mantissa for code in _CODES], dtype=np.int64)
_SCALES = np.array([2.0 ** (127 - FORMATS[code].bias) for code in _CODES])
_MASKS = np.array([NONFINITE_MASK[code] for code in _CODES], dtype=np.int64)
_VALUES = np.array([NONFINITE_VALUE[code] for code in _CODES], dtype=np.int64)
# Only e5m2 has infinities: there the mantissa decides, elsewhere all that is not finite is NaN.
_SPECIALS = np.array([0x7F800000 if code == F8_E5M2 else 0x7FC00000 for code in _CODES], dtype=np.int64)


@intrinsic
def _expand(typingctx, source, count, stage, shift, scale, mask, value, special):
    """Write `count` 8-bit floats at `source` as float32 at `stage`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, count, stage, shift, scale, mask, value, special = arguments

        def body(begin: Any, steps: Any, width: int) -> None:
            up, tested, wanted, bad = (
                splat(builder, builder.trunc(x, I32), width) for x in (shift, mask, value, special)
            )
            by = splat(builder, builder.fptrunc(scale, F32), width)
            with cgutils.for_range(builder, steps) as step:
                at = builder.add(begin, builder.mul(step.index, ir.Constant(I64, width)))
                byte = builder.zext(load(builder, builder.add(source, at), vector(I8, width)), vector(I32, width))
                size = builder.shl(builder.and_(byte, constant(I32, width, 0x7F)), up)
                single = builder.fmul(builder.bitcast(size, vector(F32, width)), by)
                sign = builder.shl(builder.and_(byte, constant(I32, width, 0x80)), constant(I32, width, 24))
                bits = builder.or_(builder.bitcast(single, vector(I32, width)), sign)
                odd = builder.icmp_unsigned("==", builder.and_(byte, tested), wanted)
                bits = builder.select(odd, builder.or_(bits, bad), bits)
                store(builder, bits, builder.add(stage, builder.mul(at, ir.Constant(I64, 4))))

        whole = builder.sdiv(count, ir.Constant(I64, 8))
        done = builder.mul(whole, ir.Constant(I64, 8))
        body(ir.Constant(I64, 0), whole, 8)
        body(done, builder.sub(count, done), 1)
        return context.get_dummy_value()

    i, u = types.int64, types.uint64
    return types.void(u, i, u, i, types.float64, i, i, i), generate


@numba.njit(nogil=True)
def expand_f8(source, code, count, stage):
    """Write `count` numbers of an 8-bit format at `source` as float32 at `stage`."""
    row = code - 4
    _expand(source, count, stage, _SHIFTS[row], _SCALES[row], _MASKS[row], _VALUES[row], _SPECIALS[row])  # type: ignore[call-arg]
