"""8-bit floats with scales, and back: every code, every dtype, runs that begin and end anywhere."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from streamsoup.kernels import codes
from streamsoup.kernels.block_scaled import dequantise, largest, quantise

FORMATS = {
    codes.F8_E4M3: (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
    codes.F8_E5M2: (ml_dtypes.float8_e5m2, torch.float8_e5m2),
    codes.F8_E4M3FNUZ: (ml_dtypes.float8_e4m3fnuz, torch.float8_e4m3fnuz),
    codes.F8_E5M2FNUZ: (ml_dtypes.float8_e5m2fnuz, torch.float8_e5m2fnuz),
}
SOURCES = {codes.BF16: ml_dtypes.bfloat16, codes.F16: np.float16, codes.F32: np.float32}
ALL_CODES = np.arange(256, dtype=np.uint8)


def bits(array):
    """Bits of float32, all NaNs alike."""
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def dequantised(stored, code, scales, grid, first=0, count=None):
    count = stored.size - first if count is None else count
    out = np.full(count + 2, 7, np.float32)
    flat = np.concatenate([np.zeros(1, np.uint8), stored.reshape(-1)])  # one byte on, so that nothing is aligned
    dequantise(flat.ctypes.data + 1 + first, code, first, count, grid, scales.ctypes.data, 0, out.ctypes.data + 4)
    assert out[0] == out[-1] == 7
    return out[1:-1]


@pytest.mark.parametrize("scale", [1.0, 0.0123, -3.0, 0.0, np.inf, np.nan, 1e-42, 3e38])
@pytest.mark.parametrize("code", FORMATS)
def test_every_code_is_that_of_torch(code, scale):
    numbers = torch.from_numpy(ALL_CODES).view(FORMATS[code][1]).float().numpy()
    scales = np.array([scale], np.float32)
    with np.errstate(all="ignore"):
        expected = numbers * scales
    found = dequantised(ALL_CODES, code, scales, (1, 256, 1, 256))
    assert_array_equal(found.view(np.uint32), bits(expected))


def repeated(scales, shape, block):
    wide = np.repeat(np.repeat(scales, block[0], -2), block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


@given(
    matrices=st.integers(1, 3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 5), st.integers(1, 17)),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_run_of_any_stack_is_that_of_numpy(matrices, rows, columns, block, ends, seed):
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 256, (matrices, rows, columns), np.uint8)
    scales = rng.standard_normal((matrices, -(-rows // block[0]), -(-columns // block[1]))).astype(np.float32)
    first, last = sorted(int(end * stored.size) for end in ends)
    numbers = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = (numbers * repeated(scales, stored.shape, block)).reshape(-1)[first:last]
    found = dequantised(stored, codes.F8_E4M3, scales, (rows, columns, *block), first, last - first)
    assert_array_equal(found.view(np.uint32), bits(expected))


def numbers_of(rng, code, shape):
    """Weights as they are, and some that are not: tiny, huge, zeros of both signs."""
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 15, shape)
    values[rng.random(shape) < 0.1] = 0
    return np.copysign(values, rng.standard_normal(shape)).astype(SOURCES[code])


@pytest.mark.parametrize("code", SOURCES)
def test_largest_magnitudes_come_of_any_runs(code):
    rng = np.random.default_rng(code)
    weights = numbers_of(rng, code, (2, 11, 37))
    weights[0, 0, 0], weights[1, 10, 36], weights[1, 0, 0] = np.nan, -np.inf, -np.nan
    grid, maxima = (11, 37, 4, 8), np.zeros((2, 3, 5), np.float32)
    size = weights.itemsize
    for first, last in ((0, 1), (1, 300), (300, 301), (301, weights.size)):
        largest(weights.ctypes.data + first * size, code, first, last - first, grid, maxima.ctypes.data, 0)
    padded = np.zeros((2, 12, 40), np.float32)
    padded[:, :11, :37] = np.abs(weights.astype(np.float32))
    assert_array_equal(maxima, padded.reshape(2, 3, 4, 5, 8).max((2, 4)))
    assert np.isnan(maxima[[0, 1], [0, 0], [0, 0]]).all()
    assert maxima[1, 2, 4] == np.inf


@pytest.mark.parametrize("code", SOURCES)
def test_weights_are_quantised_as_torch_does(code):
    rng = np.random.default_rng(code)
    weights, grid = numbers_of(rng, code, (50, 333)), (50, 333, 16, 100)
    scales = (2.0 ** rng.uniform(-20, 5, (4, 4))).astype(np.float32)
    out = np.empty(weights.size, np.uint8)
    for first, last in ((0, 77), (77, 78), (78, weights.size)):
        quantise(
            weights.ctypes.data + first * weights.itemsize, code, first, last - first, grid, scales.ctypes.data, 0,
            out.ctypes.data + first,
        )  # fmt: skip
    divided = torch.from_numpy(weights.astype(np.float32) / repeated(scales, weights.shape, (16, 100)))
    expected = divided.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert_array_equal(out.reshape(weights.shape), expected)
    assert len(np.unique(out)) > 240


def test_numbers_half_way_go_to_even_and_what_is_not_finite_stays_so():
    grid_points = ALL_CODES[:0x7F].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    halves = (grid_points[1:] + grid_points[:-1]) / 2
    tried = np.concatenate([halves, -halves, np.nextafter(halves, 0), np.nextafter(halves, np.float32(500))])
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 448, 480, 1e30, -0.0, 2.0**-10, 1e-45], np.float32)
    values = np.concatenate([tried, special]).astype(np.float32)
    out, one = np.empty(len(values), np.uint8), np.ones(1, np.float32)
    grid = (1, len(values), 1, len(values))
    quantise(values.ctypes.data, codes.F32, 0, len(values), grid, one.ctypes.data, 0, out.ctypes.data)
    assert_array_equal(out[: len(tried)], tried.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    assert out[len(tried) :].tolist() == [0x7F, 0x7F, 0x7E, 0xFE, 0x7E, 0x7E, 0x7E, 0x80, 0, 0]


def test_what_was_quantised_comes_back():
    """All finite codes with their own scale: dividing and rounding undoes the product."""
    finite = np.setdiff1d(ALL_CODES, [0x7F, 0xFF]).astype(np.uint8)
    rng, grid = np.random.default_rng(0), (1, len(finite), 1, len(finite))
    for scale in rng.uniform(1, 2, 200) * 2.0 ** rng.integers(-100, 100, 200):
        scales = np.array([scale], np.float32)
        singles, out = dequantised(finite, codes.F8_E4M3, scales, grid), np.empty(len(finite), np.uint8)
        quantise(singles.ctypes.data, codes.F32, 0, len(finite), grid, scales.ctypes.data, 0, out.ctypes.data)
        assert_array_equal(out, finite)
