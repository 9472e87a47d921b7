"""The compiled loop behind `combine`: blocks outside, sources inside. Imports numba; use `kernels.combine`."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

import threading
from functools import partial
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np

from .blocks import PAUSE, block_part, block_singles, digest_rest, means, survey
from .codes import BLOCK, ITEMSIZE
from .exact_means import LANES
from .finishing import inspect, move_bytes
from .given import MARKS, PLACES, SLOTS, SPARE, STAGE
from .hashing import block_digest
from .lanes import array_at, load_u8, load_u64, ones, trailing_zeros
from .stored import fingerprint, target_machine

__all__ = ["built", "object_code", "sum_loop", "wide_loop"]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)
_LOCK = threading.Lock()


_U8, _I64, _U64, _F64 = (numba.types.Array(t, 1, "C") for t in (numba.u1, numba.i8, numba.u8, numba.f8))
# Both loops take addresses and numbers only, so that they can be called without numba too (`stored`).
_COMBINE = numba.i8(
    numba.u8, numba.i8, numba.u8, numba.u8, numba.f8, numba.f8, numba.i8, numba.i8, numba.i8, numba.u8, numba.i8,
    numba.u8, numba.u8, numba.u8, numba.u8, numba.u8, numba.i8, numba.i8, numba.i8, numba.u8,
)  # fmt: skip
_DIGEST = numba.u8(numba.u8, numba.i8, numba.i8, numba.i8)


_WIDE = numba.i8(
    _U64, _U8, _F64, numba.f8, numba.f8, numba.f8, numba.i8, numba.i8, numba.u8, numba.i8,
    _U8, _U64, _I64, numba.u8, numba.types.Array(numba.f8, 2, "C"), numba.types.Array(numba.i8, 2, "C"), _U8,
)  # fmt: skip


def _build_wide(stamp: int) -> Any:
    from .native_wide import build_wide

    return build_wide(_WIDE, stamp)


def _build_combine(stamp: int, single: bool, **options: Any) -> Any:
    @numba.njit(_COMBINE, nogil=True, error_model="numpy", **options)
    def loop(
        sources_at, n, codes_at, weights_at, divisor, reciprocal, mode, elements, first_block, out, out_code,
        hashed_at, digests_at, nonfinite_at, reals_at, integers_at, gap, top, bottom, acc,
    ):  # fmt: skip
        overflowed = np.int64(stamp) & 0
        sources, codes = array_at(sources_at, (n,), np.uint64), array_at(codes_at, (n,), np.uint8)
        weights, hashed = array_at(weights_at, (n,), np.float64), array_at(hashed_at, (n,), np.uint8)
        digests, nonfinite = array_at(digests_at, (n,), np.uint64), array_at(nonfinite_at, (n,), np.int64)
        reals, integers = array_at(reals_at, (4, 2), np.float64), array_at(integers_at, (4, 4), np.int64)
        spare, scratch = acc + np.uint64(SPARE), (acc + np.uint64(STAGE), acc + np.uint64(PLACES))
        division, encoder, bounds = (divisor, reciprocal, mode), (reals, integers), (gap, top, bottom)
        in_place, digesting, plain = survey(sources, codes, weights, out, out_code, hashed)
        digest_slots = acc + np.uint64(SLOTS) if digesting else np.uint64(0)
        rest = 0
        for block in range((elements + BLOCK - 1) // BLOCK):
            begin = block * BLOCK
            count = min(BLOCK, elements - begin)
            target = out + np.uint64(begin * _SIZES[out_code])
            goal = spare if in_place else target
            found, failed, done, slots = np.int64(0), np.uint64(0), 0, digest_slots
            if plain and gap and rest == 0:
                done = count // LANES
                failed = means(sources, out_code, begin, done, goal, division, bounds, acc, slots)
                slots = np.uint64(0)
                # Where the proof fails for most, it is not worth its time; the bits are the same either way.
                rest = PAUSE if 2 * ones(failed) > done else 0
            else:
                rest = max(rest - 1, 0)
            if single:
                found = block_singles(
                    sources, codes, weights, begin, count, goal, out_code, divisor, acc, spare, scratch, slots, encoder
                )  # fmt: skip
            more = not single
            while more:
                # What remains: the steps without proof, then what no step covered.
                start, length, more = LANES * trailing_zeros(failed), LANES, failed != 0
                if not more:
                    start, length = LANES * done, count - LANES * done
                failed &= failed - np.uint64(1)
                found |= block_part(
                    sources, codes, weights, begin, start, length, goal, out_code, division, acc, scratch,
                    slots, encoder,
                )  # fmt: skip
            if digesting:
                digest_rest(sources, codes, begin, count, first_block + block, hashed, digests, digest_slots)
            if found:
                overflowed += inspect(sources, codes, begin, count, goal, out_code, nonfinite, acc + np.uint64(MARKS))
            if in_place:
                move_bytes(goal, target, count * _SIZES[out_code])
        return overflowed

    return loop


def _build_digest(stamp: int, **options: Any) -> Any:
    @numba.njit(_DIGEST, nogil=True, error_model="numpy", **options)
    def loop(address, nbytes, itemsize, first_block):
        total = np.uint64(stamp) & np.uint64(0)
        step = BLOCK * itemsize
        for block in range((nbytes + step - 1) // step):
            begin = block * step
            total += block_digest(address + np.uint64(begin), min(step, nbytes - begin), first_block + block)
        return total

    return loop


def _build_sum(stamp: int) -> Any:
    @numba.njit(numba.u8(numba.u8, numba.i8), nogil=True, cache=True, error_model="numpy")
    def loop(address, nbytes):
        total = np.uint64(stamp) & np.uint64(0)
        for j in range(nbytes >> 3):
            total += load_u64(address + np.uint64(8) * np.uint64(j))
        for j in range(nbytes & ~7, nbytes):
            total += load_u8(address + np.uint64(j))
        return total

    return loop


def _from(module: str, name: str) -> Any:
    def build(stamp: int, **options: Any) -> Any:
        from importlib import import_module

        return getattr(import_module(f".{module}", __package__), f"build_{name}")(stamp, **options)

    return build


_FREE: dict[str, Any] = {"combine": partial(_build_combine, single=False), "digest": _build_digest}
_FREE["singles"] = partial(_build_combine, single=True)
_FREE |= {name: _from("native_low_rank", name) for name in ("low_rank", "spread")}
_FREE |= {name: _from("native_block_scaled", name) for name in ("dequantise", "largest", "quantise")}
_BUILDERS: dict[str, Any] = {name: partial(build, cache=True) for name, build in _FREE.items()}
_BUILDERS |= {"wide": _build_wide, "sum": _build_sum}
_BUILDERS |= {"survey": _from("native_survey", "survey")}
_BUILDERS |= {name: _from("native_measuring", name) for name in ("decode", "gram")}
_BUILDERS["products"] = _from("native_products", "products")
_BUILDERS["vector_machine"] = _from("native_machine", "vector_machine")
_BUILT: dict[str, Any] = {}


def built(name: str) -> Any:
    """Return a compiled loop by its name; the first call compiles it or loads it from numba's cache."""
    with _LOCK:
        if name not in _BUILT:
            _BUILT[name] = _BUILDERS[name](fingerprint())
        return _BUILT[name]


def object_code(name: str, symbol: str) -> bytes:
    """Compile a loop of addresses and numbers to an object file; `symbol` has numba's calling convention there."""
    loop = _FREE[name](fingerprint(), _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    (signature,) = loop.signatures
    module = llvm.parse_assembly(loop.inspect_llvm(signature))
    module.get_function(loop.overloads[signature].fndesc.llvm_func_name).name = symbol
    return bytes(target_machine().emit_object(module))


def wide_loop() -> Any:
    """Return the compiled loop of `combine_wide`."""
    return built("wide")


def sum_loop() -> Any:
    """Return the compiled loop of `read_sum`."""
    return built("sum")
