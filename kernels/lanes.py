"""Loads, stores and bit casts at plain addresses, for numba.

Addresses are integers, so a tensor may begin at any byte: every access states align=1, which costs nothing
on x86-64 and arm64, and the bounce copy that a misaligned tensor would otherwise need is gone.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from .halves import singles_from_halves

__all__ = [
    "array_at",
    "as_bits",
    "as_float",
    "load_f16",
    "load_f32",
    "load_f64",
    "load_u8",
    "load_u16",
    "load_u32",
    "load_u64",
    "ones",
    "store_u8",
    "store_u16",
    "store_u32",
    "store_u64",
    "trailing_zeros",
]


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """Turn an integer address into a pointer to `kind`."""
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def array_at(typingctx: Any, address: Any, shape: Any, kind: Any) -> Any:
    """View memory at an aligned address as a C-contiguous array of a numpy dtype, owned by nobody."""
    array = types.Array(kind.dtype, len(shape), "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = context.get_data_type(array.dtype)
        size = context.get_constant(types.intp, context.get_abi_sizeof(element))
        sizes = cgutils.unpack_tuple(builder, arguments[1], array.ndim)
        strides = [size]
        for rows in reversed(sizes[1:]):
            strides.insert(0, builder.mul(strides[0], rows))
        made = make_array(array)(context, builder)
        populate_array(
            made, pointer(builder, arguments[0], element), shape=sizes, strides=strides, itemsize=size, meminfo=None
        )
        return made._getvalue()

    return array(address, shape, kind), generate


def _loader(kind: Any, result: Any, widen: Any) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return widen(builder, builder.load(pointer(builder, arguments[0], kind), align=1))

        return result(types.uint64), generate

    return load


def _storer(bits: int) -> Any:
    kind = ir.IntType(bits)

    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = arguments[1] if bits == 64 else builder.trunc(arguments[1], kind)
            builder.store(value, pointer(builder, arguments[0], kind), align=1)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64), generate

    return store


def _caster(source: Any, target: Any, kind: Any) -> Any:
    @intrinsic
    def cast(typingctx: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], kind)

        return target(source), generate

    return cast


@intrinsic
def ones(typingctx: Any, bits: Any) -> Any:
    """Return how many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def trailing_zeros(typingctx: Any, bits: Any) -> Any:
    """Return the number of the lowest bit set, 64 for none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


WORD = ir.IntType(64)
_ZEXT = lambda builder, value: builder.zext(value, WORD)  # noqa: E731
_FPEXT = lambda builder, value: builder.fpext(value, ir.DoubleType())  # noqa: E731
_SAME = lambda builder, value: value  # noqa: E731
_FROM_HALF = lambda builder, value: _FPEXT(builder, singles_from_halves(builder, value))  # noqa: E731

load_u8 = _loader(ir.IntType(8), types.uint64, _ZEXT)
load_u16 = _loader(ir.IntType(16), types.uint64, _ZEXT)
load_u32 = _loader(ir.IntType(32), types.uint64, _ZEXT)
load_u64 = _loader(WORD, types.uint64, _SAME)
load_f16 = _loader(ir.IntType(16), types.float64, _FROM_HALF)
load_f32 = _loader(ir.FloatType(), types.float64, _FPEXT)
load_f64 = _loader(ir.DoubleType(), types.float64, _SAME)
store_u8 = _storer(8)
store_u16 = _storer(16)
store_u32 = _storer(32)
store_u64 = _storer(64)
as_bits = _caster(types.float64, types.uint64, WORD)
as_float = _caster(types.uint64, types.float64, ir.DoubleType())
