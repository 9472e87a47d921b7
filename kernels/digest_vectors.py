"""The two sums of a block's digest (`hashing`), as vector code: in a loop of its own or beside another's loads."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import I32, I64, constant, load, plus, splat, store, vector

__all__ = ["absorb", "counters", "digest_sums"]

_STEP = 0x9E3779B97F4A7C15
_M64 = (1 << 64) - 1
_LANES = vector(I64, 4)


def counters(builder: Any, first: Any, count: int) -> list[Any]:
    """Return (j + 1) * K for `count` vectors of words j, from word `first` (a scalar) of the block."""
    base = splat(builder, builder.mul(first, ir.Constant(I64, _STEP)), 4)
    found = []
    for number in range(count):
        lanes = [(4 * number + lane + 1) * _STEP & _M64 for lane in range(4)]
        found.append(builder.add(base, ir.Constant(_LANES, lanes)))
    return found


def _terms(builder: Any, word: Any, counter: Any) -> tuple[Any, Any]:
    a = builder.add(word, counter)
    low, high = builder.and_(a, constant(I64, 4, 0xFFFFFFFF)), builder.lshr(a, constant(I64, 4, 32))
    return builder.mul(low, high), word


def absorb(builder: Any, address: Any, numbers: list[Any], slot: Any) -> None:
    """Add the words at `address` to the sums at `slot`."""
    sums: list[Any] = [load(builder, plus(builder, slot, 32 * half), _LANES) for half in range(2)]
    for number, counter in enumerate(numbers):
        word = load(builder, plus(builder, address, 32 * number), _LANES)
        sums = [builder.add(one, term) for one, term in zip(sums, _terms(builder, word, counter), strict=True)]
    for half, one in enumerate(sums):
        store(builder, one, plus(builder, slot, 32 * half))


@intrinsic
def digest_sums(typingctx, address, words):
    """Return the two sums (s1, s2) of `block_digest` over the first `words` // 16 * 16 whole words."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, words = arguments
        # Four vectors a step, each with sums of its own, so that no addition waits for another.
        sums = [[cgutils.alloca_once_value(builder, constant(I64, 4, 0)) for _ in range(4)] for _ in range(2)]
        numbers = [cgutils.alloca_once_value(builder, one) for one in counters(builder, ir.Constant(I64, 0), 4)]
        with cgutils.for_range(builder, builder.udiv(words, ir.Constant(I64, 16))) as step:
            here = builder.add(address, builder.mul(step.index, ir.Constant(I64, 128)))
            for number in range(4):
                counter = builder.load(numbers[number])
                word = load(builder, plus(builder, here, 32 * number), _LANES)
                for one, term in zip(sums, _terms(builder, word, counter), strict=True):
                    builder.store(builder.add(builder.load(one[number]), term), one[number])
                builder.store(builder.add(counter, constant(I64, 4, 16 * _STEP & _M64)), numbers[number])
        totals = []
        for one in sums:
            a, b, c, d = (builder.load(part) for part in one)
            lanes = builder.add(builder.add(a, b), builder.add(c, d))
            total = ir.Constant(I64, 0)
            for lane in range(4):
                total = builder.add(total, builder.extract_element(lanes, ir.Constant(I32, lane)))
            totals.append(total)
        return context.make_tuple(builder, signature.return_type, totals)

    return types.UniTuple(types.uint64, 2)(types.uint64, types.int64), generate
