"""Means of 16-bit sources may be taken in float32 where that is proved exact; torch, which never does, is the judge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamsoup.kernels import combine as numba_kernels
from streamsoup.kernels import torch_combine
from streamsoup.kernels.codes import BF16, F16

ONE = {BF16: 0x3F80, F16: 0x3C00}


def patterns(rng, code, style, count):
    """Bits of a base: anything at all, small steps from one, or normal weights."""
    if style == "any":
        return rng.integers(0, 1 << 16, count, dtype=np.uint16)
    if style == "steps":
        return (ONE[code] + rng.integers(0, 64, count)).astype(np.uint16)
    normal = rng.standard_normal(count, dtype=np.float32)
    return (
        normal.astype(np.float16).view(np.uint16) if code == F16 else (normal.view(np.uint32) >> 16).astype(np.uint16)
    )


@pytest.mark.parametrize("code", [BF16, F16])
@pytest.mark.parametrize("style", ["any", "steps", "weights"])
@pytest.mark.parametrize("divisor", ["N", 1.0, 3.0, 7.0, 4095.0, 4097.0, 0.5])
def test_means_of_16_bit_sources_equal_those_in_float64(code, style, divisor):
    rng = np.random.default_rng(7)
    for count in (1, 2, 3, 6, 8, 10, 12, 31, 72):
        elements = int(rng.integers(2000, 7000))
        base = patterns(rng, code, style, elements)
        flips = [rng.integers(0, 1 << int(rng.integers(1, 5)), elements).astype(np.uint16) for _ in range(count)]
        sources = [base ^ flip ^ ((rng.random(elements) < 0.1).astype(np.uint16) << 15) for flip in flips]
        by = float(count) if divisor == "N" else divisor
        out = np.empty(elements, np.uint16)
        digests, nonfinite = np.zeros(count, np.uint64), np.zeros(count, np.int64)
        overflowed = numba_kernels.combine(
            np.array([s.ctypes.data for s in sources], np.uint64),
            np.full(count, code, np.uint8),
            np.ones(count),
            by,
            elements,
            0,
            out.ctypes.data,
            code,
            np.ones(count, np.uint8),
            digests,
            nonfinite,
        )
        expected = torch_combine.combine(
            [torch.from_numpy(s.view(np.uint8)) for s in sources],
            [code] * count,
            [1.0] * count,
            by,
            0,
            code,
            [True] * count,
        )
        assert np.array_equal(out, expected[0].numpy().view(np.uint16))
        assert np.array_equal(digests, expected[1].numpy().view(np.uint64))
        assert np.array_equal(nonfinite, expected[2].numpy())
        assert overflowed == int(expected[3])


@pytest.mark.parametrize("count", [1, 2, 8, 20])
@pytest.mark.parametrize("divisor", [1.0, 4.0, 256.0, 4095.0])
def test_an_infinity_among_the_largest_float16_is_counted(count, divisor):
    largest, infinity = 0x7BFF, 0x7C00
    sources = [np.full(64, largest, np.uint16) for _ in range(count)]
    sources[-1][40] = infinity
    out = np.empty(64, np.uint16)
    nonfinite = np.zeros(count, np.int64)
    numba_kernels.combine(
        np.array([s.ctypes.data for s in sources], np.uint64),
        np.full(count, F16, np.uint8),
        np.ones(count),
        divisor,
        64,
        0,
        out.ctypes.data,
        F16,
        np.zeros(count, np.uint8),
        np.zeros(count, np.uint64),
        nonfinite,
    )
    assert out[40] == infinity
    assert nonfinite.tolist() == [0] * (count - 1) + [1]
