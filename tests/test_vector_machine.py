"""Traced functions give, bit for bit, what torch computes operation by operation; and sums have one shape."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from factory import bits
from hypothesis import given
from hypothesis import strategies as st

from streamsoup.backends.rows import row_sums
from streamsoup.backends.tracing import trace
from streamsoup.backends.values import TorchValues
from streamsoup.kernels import codes
from streamsoup.kernels.measuring import ROUNDS
from streamsoup.kernels.torch_measuring import halves, histograms
from streamsoup.kernels.vector_machine import STRIP, Stretch
from streamsoup.measurement import TreeSum
from streamsoup.methods.protocol import TensorInfo

KINDS = {
    codes.BF16: ml_dtypes.bfloat16,
    codes.F16: np.float16,
    codes.F32: np.float32,
    codes.F64: np.float64,
    codes.F8_E4M3: ml_dtypes.float8_e4m3fn,
}
WIDTH = 37


def _clipped(v):
    return (v.rows * 2.0).clip(-1.0, 1.5)


def _logic(v):
    a, b = v.rows[0], v.rows[-1]
    return v.where((a > b) & (a <= 1.0) | (b == a) & ~(a >= 0.5), a - b, 3.0)


def _roots(v):
    return v.stack([v.sqrt(abs(v.rows[0])), v.rows[0] ** 2, 1.0 / (v.rows[0] - v.rows[-1]), -v.rows[0]])


def _signs(v):
    deltas = v.rows[1:] - v.rows[0]
    return v.where(v.sign(deltas) == v.sign(v.total(deltas)), deltas, 0.0)


def _weighted(v):
    return v.total(v.rows * v.column(tuple(0.1 * k for k in range(len(v.rows))))) / 3


def _chance(v):
    return v.where(v.uniform(7, len(v.rows)) < 0.4, v.single(v.rows), 0.0) + v.uniform(8, 1)


def _ranks(v):
    return v.row_ranks(abs(v.rows)) * v.rows


def _rows(v):
    norms = [v.row_dot(row, row) for row in v.rows]
    return v.total(norms) + v.row_dot(v.rows[0], v.rows[-1]) * v.rows[0]


def _outside(v):
    found = v.apply(lambda x: np.stack([np.sin(x), np.arctan(x)]), v.rows[0] * 0.5)
    return found[0] * v.rows[-1] + found[1]


FUNCTIONS = [_clipped, _logic, _roots, _signs, _weighted, _chance, _ranks, _rows, _outside, lambda v: v.rows[1:]]


def checkpoints(count, length, seed=0, kinds=tuple(KINDS), special=False):
    rng = np.random.default_rng(seed)
    arrays, dtypes = [], []
    for k in range(count):
        code = kinds[k % len(kinds)]
        values = rng.standard_normal(length)
        values[rng.random(length) < 0.1] = 0.0
        if special:
            values[rng.random(length) < 0.05] = np.inf
            values[rng.random(length) < 0.05] = np.nan
        arrays.append(np.ascontiguousarray(values.astype(KINDS[code])))
        dtypes.append(code)
    return arrays, np.array(dtypes, np.uint8)


def both(function, count, length, start=0, **options):
    """Run a function on the machine and on torch; returns the program, its stretch, and torch's rows."""
    arrays, dtypes = checkpoints(count, length, **options)
    tensor = TensorInfo("a.weight", (-(-(start + length) // WIDTH), WIDTH))
    addresses = np.array([a.ctypes.data for a in arrays], np.uint64)
    program = trace(function, tensor, count)
    rows = torch.from_numpy(np.stack([a.astype(np.float64) for a in arrays]))
    expected = function(TorchValues(rows, tensor, start)).reshape(-1, length)
    return program, Stretch(addresses, dtypes, 0, length, start), expected, arrays


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("count", "rows"), [(2, 1), (3, 7), (10, 140), (72, 20)])
def test_every_operation_gives_the_bits_of_torch(function, count, rows):
    program, stretch, expected, _kept = both(function, count, rows * WIDTH)
    found, _ = program.to_rows(stretch)
    assert np.array_equal(bits(found), bits(expected.numpy()))


@pytest.mark.parametrize("length", [1, STRIP - 1, STRIP, STRIP + 1, 2048, 2049, 5 * 2048 + 777])
def test_any_length_and_any_part_of_a_tile(length):
    program, stretch, expected, kept = both(_signs, 4, length)
    assert np.array_equal(program.to_rows(stretch)[0], expected.numpy())
    middle = length // 3
    part = Stretch(stretch.sources, stretch.codes, middle, length - middle, middle)
    assert np.array_equal(program.to_rows(part)[0], expected.numpy()[:, middle:])
    assert len(kept) == 4


def test_what_is_not_finite_is_counted_in_each_checkpoint_and_in_the_result():
    program, stretch, expected, arrays = both(lambda v: v.total(v.rows), 4, 5000, special=True, kinds=(codes.F32,))
    _, bad = program.to_rows(stretch)
    assert bad[:-1].tolist() == [int((~np.isfinite(a)).sum()) for a in arrays]
    assert bad[-1] == int((~expected.isfinite()).sum())
    assert bad.all()


@pytest.mark.parametrize("length", [3, 2048, 2049, 10 * 2048 + 5])
def test_sums_and_counts_are_those_of_torch(length):
    program, stretch, expected, _kept = both(lambda v: abs(v.rows[1:] - v.rows[0]), 5, length)
    assert np.array_equal(bits(program.to_sums(stretch)), bits(halves(expected).numpy()))
    keys = expected.float()
    chosen = keys[:, :2].contiguous().view(torch.int32).numpy().astype(np.uint32)
    for number, (upper, _) in enumerate(ROUNDS):
        prefixes = chosen >> np.uint32(upper) if upper < 31 else np.zeros_like(chosen)
        found = program.to_counts(stretch, number, prefixes)
        assert np.array_equal(found, histograms(keys, number, torch.from_numpy(prefixes.astype(np.int64))).numpy())
        assert found.sum() > 0


@pytest.mark.parametrize("width", [1, 2, 3, 17, 64, 1001])
def test_row_sums_are_sums(width):
    rows = np.random.default_rng(0).standard_normal((1, 6 * width))
    found = row_sums(rows, width)
    expected = np.repeat(rows.reshape(-1, width).sum(axis=1), width)
    np.testing.assert_allclose(found[0], expected, rtol=1e-12, atol=1e-12)
    assert np.array_equal(found, row_sums(torch.from_numpy(rows), width).numpy())


@given(st.data())
def test_a_tree_sum_depends_on_nothing_but_its_numbers(data):
    count = data.draw(st.integers(1, 70))
    values = (
        np.random.default_rng(count).standard_normal((count, 2)) * 10.0 ** np.arange(-5, 5)[np.arange(count) % 10, None]
    )
    plain = TreeSum()
    for index, value in enumerate(values):
        plain.add(index, value.copy())
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=6))})
    parts = list(itertools.pairwise(cuts))
    whole = TreeSum()
    for first, last in data.draw(st.permutations(parts)):
        part = TreeSum()
        part.add_run(first, values[first:last])
        whole.merge(part)
    assert np.array_equal(whole.total(), plain.total())
    np.testing.assert_allclose(plain.total(), values.sum(axis=0), rtol=1e-9)
