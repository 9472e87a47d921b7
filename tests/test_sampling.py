"""Which elements are sampled: of all tensors, in their bounds, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from factory import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from streamsoup.execution import Execution
from streamsoup.recipe import make_recipe
from streamsoup.sampling import _pieces, choose_sample, others
from streamsoup.soup_plan import plan_soup
from streamsoup.tiling import BLOCK_ELEMENTS

SHAPES = {"a": (700, 1000), "b": (3,), "c": (300, 1000), "none": (0, 2), "one": ()}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()} | {"ids": np.arange(50_000)}
    return [str(write_checkpoint(folder / f"run{i}", tensors)) for i in range(3)]


def plan_of(paths, **options):
    plan, _ = plan_soup(make_recipe(paths, **options), None, Execution(workers=1))
    return plan


def is_partition(plan, *parts):
    """Whether ranges, joined, are all elements of all tensors, each once."""
    for tensor, count in enumerate(plan.table.elements.tolist()):
        seen = np.zeros(count, int)
        for part in parts:
            for start, length in part.get(tensor, []):
                assert length > 0
                assert start + length <= count
                seen[start : start + length] += 1
        assert (seen == 1).all()
    return True


@pytest.mark.parametrize("sample_bytes", [1, 10_000, 1_000_000, 10**9])
def test_all_tensors_have_their_share(paths, sample_bytes):
    plan = plan_of(paths)
    sample = choose_sample(plan, sample_bytes, 0)
    assert is_partition(plan, sample, others(plan, sample))
    assert set(sample) == {t for t, n in enumerate(plan.table.elements.tolist()) if n}
    taken = sum(n * plan.out_dtype(t).itemsize for t, pieces in sample.items() for _, n in pieces)
    assert min(sample_bytes, plan.layout.data_bytes) <= taken <= sample_bytes + 8 * BLOCK_ELEMENTS * len(plan.table)


def test_the_seed_decides_and_nothing_else(paths):
    plan = plan_of(paths)
    one, same, other = (choose_sample(plan, 100_000, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_tensors_that_must_be_measured_are_taken_whole(paths):
    plan = plan_of(paths[1:], method="ties", base=paths[0], parameters={"density": 0.3})
    names = plan.table.names
    sample = choose_sample(plan, 2_000_000, 0)
    assert is_partition(plan, sample, others(plan, sample))
    floats = {names[t]: pieces for t, pieces in sample.items() if plan.is_averaged(t)}
    assert floats
    assert all(pieces == [(0, int(np.prod(SHAPES[name])))] for name, pieces in floats.items())
    assert "a" not in floats  # larger than its share
    assert sum(n for _, n in sample[names.index("ids")]) < 50_000
    assert any(plan.is_averaged(t) for t in choose_sample(plan, 1, 0)), "one at least"


@given(st.integers(1, 10**7), st.floats(1e-9, 1), st.integers(0, 9))
def test_pieces_lie_in_their_tensor_without_overlap(count, share, seed):
    pieces = _pieces(count, share, np.random.default_rng(seed))
    end = 0
    for start, length in pieces:
        assert start >= end
        assert length > 0
        end = start + length
    assert end <= count
    assert sum(n for _, n in pieces) >= min(count * share, count) - BLOCK_ELEMENTS * len(pieces)
