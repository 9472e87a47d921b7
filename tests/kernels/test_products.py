"""Inner products with one row: the same bits as a sum by halves in torch, and as close to exact as float64 allows."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from streamsoup.kernels import codes, measuring, torch_combine, torch_measuring

DTYPES = {
    codes.BF16: ml_dtypes.bfloat16,
    codes.F16: np.float16,
    codes.F32: np.float32,
    codes.F64: np.float64,
    codes.F8_E4M3: ml_dtypes.float8_e4m3fn,
}


def sources_of(kinds, elements, seed, shift=0):
    """Rows of raw bytes that begin `shift` bytes after an aligned address."""
    draw = np.random.default_rng(seed)
    found = []
    for kind in kinds:
        raw = draw.normal(size=elements).astype(DTYPES[kind]).view(np.uint8)
        room = np.empty(len(raw) + shift, np.uint8)
        room[shift:] = raw
        found.append(room[shift:])
    return found


def measured(rows, kinds, begin, elements):
    addresses = np.array([row.ctypes.data for row in rows], np.uint64)
    return measuring.products(addresses, np.array(kinds, np.uint8), begin, elements)


@pytest.mark.parametrize("elements", [1, 7, 2047, 2048, 2049, 3 * 2048 + 5])
@pytest.mark.parametrize("last", [codes.F32, codes.BF16, codes.F64])
def test_bits_are_those_of_halves_in_torch(elements, last):
    kinds = [*DTYPES, last]
    rows = sources_of(kinds, elements, seed=elements)
    wide = torch.stack([torch_combine.widen(torch.from_numpy(r), k) for r, k in zip(rows, kinds, strict=True)])
    expected = torch_measuring.halves(wide[:-1] * wide[-1]).T.numpy()
    assert np.array_equal(measured(rows, kinds, 0, elements), expected)


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_any_alignment_will_do(shift):
    kinds = [codes.BF16, codes.F32, codes.F64, codes.F32]
    aligned = measured(sources_of(kinds, 5000, seed=1), kinds, 0, 5000)
    assert np.array_equal(measured(sources_of(kinds, 5000, seed=1, shift=shift), kinds, 0, 5000), aligned)


def test_blocks_may_begin_anywhere():
    kinds = [codes.BF16, codes.F16, codes.F32]
    rows = sources_of(kinds, 5 * 2048 + 100, seed=2)
    whole = measured(rows, kinds, 0, 5 * 2048 + 100)
    assert np.array_equal(measured(rows, kinds, 2 * 2048, 3 * 2048 + 100), whole[2:])


def test_close_to_exact():
    kinds = [codes.BF16, codes.F32]
    rows = sources_of(kinds, 2048, seed=3)
    left, right = rows[0].view(ml_dtypes.bfloat16).astype(float), rows[1].view(np.float32).astype(float)
    exact = math.fsum(a * b for a, b in zip(left, right, strict=True))  # 8 + 24 bits: every product is exact
    assert abs(measured(rows, kinds, 0, 2048)[0, 0] - exact) <= 11 * 2.0**-53 * np.abs(left * right).sum()


def test_nan_goes_into_its_own_block_alone():
    rows = sources_of([codes.F32, codes.F32, codes.F32], 3 * 2048, seed=4)
    rows[0].view(np.float32)[2048 + 17] = np.nan
    found = measured(rows, [codes.F32] * 3, 0, 3 * 2048)
    assert np.isnan(found).tolist() == [[False, False], [True, False], [False, False]]
