"""W + s·U·V, element by element, against numpy in float64: the same bits wherever a run begins and ends."""

from __future__ import annotations

import numpy as np
import pytest
from adapter_pools import low_rank as product
from factory import DTYPES, any_bits

from streamsoup.kernels import native, stored
from streamsoup.kernels.codes import BF16, F16, F32, F64
from streamsoup.kernels.low_rank import LANES, add_low_rank, prepare, spread

CODES = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F64}


def address(array):
    return array.ctypes.data


def panels(right, code):
    rank, columns = right.shape
    out = np.full((-(-columns // LANES), rank, LANES), np.nan)
    spread(address(right), code, right.shape, (columns, 1), address(out), (LANES, LANES * rank, 1))
    return out


def run(weights, left, right, scale, begin, end, *, misaligned=0, step=None):
    """Compute a run of elements, `step` columns at a time."""
    code = CODES[{2: "BF16", 4: "F32", 8: "F64"}[weights.itemsize]] if weights.dtype != np.float16 else F16
    (_, columns), size = weights.shape, weights.itemsize
    raw = np.empty(weights.nbytes + misaligned, np.uint8)
    raw[misaligned:] = np.frombuffer(weights.tobytes(), np.uint8)
    out = np.empty(end - begin, np.float64 if code == F64 else np.float32)
    rows = np.ascontiguousarray(left[begin // columns :])
    for start in range(0, columns, step or columns):
        window = start, min(columns, start + (step or columns))
        lanes = panels(np.ascontiguousarray(right[:, slice(*window)], np.float64), F64)
        add_low_rank(
            address(raw) + misaligned + begin * size, code, address(out), end - begin, begin % columns, columns, window,
            address(rows), address(lanes), left.shape[1], scale,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (5, 33, 3), (40, 64, 16), (3, 100, 7), (70, 7, 2)])
def test_runs(dtype, rows, columns, rank):
    rng = np.random.default_rng(rows)
    weights = rng.standard_normal((rows, columns)).astype(DTYPES[dtype])
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    kind = np.float64 if dtype == "F64" else np.float32
    expected = (weights.astype(np.float64) + 0.3 * product(left, right)).astype(kind).reshape(-1)
    for begin, end in [(0, rows * columns), *(sorted(rng.integers(0, rows * columns + 1, 2)) for _ in range(10))]:
        for step in (None, 1, 11, 40):
            found = run(weights, left, right, 0.3, int(begin), int(end), misaligned=1, step=step)
            assert found.tobytes() == expected[begin:end].tobytes()


def test_products_and_sums_are_not_fused():
    """1 + 2⁻³⁰ squared has a bit that float64 loses, and a fused sum would keep."""
    x = 1 + 2.0**-30
    left, right = np.array([[1.0, x]]), np.full((2, 64), [[-1.0], [x]])
    expected = -1.0 + np.float64(x) * x
    assert expected != float.fromhex("0x1.00000002p-29") + 2.0**-60
    found = run(np.zeros((1, 64)), left, right, 1.0, 0, 64)
    assert (found == expected).all()
    factor = run(np.full((1, 64), -1.0), np.array([[x]]), np.ones((1, 64)), x, 0, 64)
    assert (factor == expected).all()


def test_sums_go_in_the_order_of_the_rank():
    left, right = np.array([[1e30, 1.0, -1e30]]), np.ones((3, 40))
    assert (run(np.zeros((1, 40)), left, right, 1.0, 0, 40) == 0.0).all()
    assert (run(np.zeros((1, 40)), left[:, [0, 2, 1]], right, 1.0, 0, 40) == 1.0).all()


def test_signs_of_zeros():
    """The sum begins with a product, not with zero."""
    found = run(np.full((1, 40), -0.0), np.array([[-0.0]]), np.ones((1, 40)), 1.0, 0, 40)
    assert np.signbit(found).all()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_nans_are_canonical(dtype):
    weights = np.full((2, 50), np.nan, DTYPES[dtype])
    weights.view(np.uint32)[:, 0] |= 77
    found = run(weights, np.ones((2, 1)), np.ones((1, 50)), -1.0, 0, 100)
    word = {4: np.uint32, 8: np.uint64}[found.itemsize]
    assert set(found.view(word).tolist()) == {0x7FC00000 if dtype == "F32" else 0x7FF8000000000000}


def test_too_large_for_float32_is_infinite():
    assert np.isposinf(run(np.ones((1, 9), np.float32), np.array([[1e39]]), np.ones((1, 9)), 1.0, 0, 9)).all()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 70), (16, 33), (70, 3)])
def test_numbers_are_spread_exactly(dtype, rows, columns):
    source = any_bits(np.random.default_rng(0), dtype, (rows, columns))
    found = panels(source, CODES[dtype]).transpose(1, 0, 2).reshape(rows, -1)[:, :columns]
    assert found.tobytes() == source.astype(np.float64).tobytes()
    turned = np.empty((columns, rows))  # rows of the one are columns of the other
    spread(address(source), CODES[dtype], (rows, columns), (columns, 1), address(turned), (1, LANES * rows, rows))
    assert turned.tobytes() == source.T.astype(np.float64).tobytes()
    other = np.full((-(-rows // LANES), columns, LANES), np.nan)
    spread(address(source), CODES[dtype], (columns, rows), (1, columns), address(other), (LANES, LANES * columns, 1))
    found = other.transpose(1, 0, 2).reshape(columns, -1)[:, :rows]
    assert found.tobytes() == source.T.astype(np.float64).tobytes()


def test_numba_gives_what_is_stored(monkeypatch):
    prepare()
    weights, left, right = np.ones((3, 41), np.float32), np.full((3, 2), 0.1), np.full((2, 41), 0.7)
    expected = run(weights, left, right, 0.3, 0, 123)
    monkeypatch.setattr("streamsoup.kernels.low_rank.entry", native.built)
    assert run(weights, left, right, 0.3, 0, 123).tobytes() == expected.tobytes()
    assert {"low_rank", "spread"} <= set(stored._ENTRIES)
