"""Plans: pure, made from headers alone, and the same for every way of making a soup."""

from __future__ import annotations

import os

import numpy as np
import pytest
from factory import SHAPES, fine_tunes, realistic, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from simmer import plan_for

from streamsoup.checkpoints import open_checkpoints
from streamsoup.methods import linear
from streamsoup.planner import make_plan
from streamsoup.tiling import BLOCK_ELEMENTS


def plan_of(paths, weights=None, **options):
    defaults = {"budget_bytes": 10**9, "workers": 2, "staged": False}
    method = linear(weights or [1.0] * len(paths), normalize=options.pop("normalize", True))
    return make_plan(open_checkpoints([str(p) for p in paths]), method, **{**defaults, **options})


def test_a_plan_reads_no_tensor(tmp_path):
    """The data of both files are cut off after the headers were read; the plan is made all the same."""
    runs = fine_tunes(tmp_path, 2)
    checkpoints = open_checkpoints(runs)
    for checkpoint in checkpoints:
        os.truncate(checkpoint.shards[0].path, 0)
    make_plan(checkpoints, linear([1.0, 1.0], normalize=True), budget_bytes=10**9, workers=2, staged=False)


def test_bytes_and_parameters_are_counted(tmp_path):
    tensors = [{**realistic(i, SHAPES, d), "n": np.arange(5)} for i, d in enumerate(["BF16", "F32"])]
    plan = plan_of([write_checkpoint(tmp_path / f"r{i}", t) for i, t in enumerate(tensors)])
    elements = sum(int(np.prod(s)) for s in SHAPES.values())
    assert plan.parameters == elements
    assert plan.bytes_to_read == 2 * elements + 4 * elements + 2 * 40
    assert plan.bytes_to_write == sum(s.file_bytes for s in plan.layout.shards)
    assert plan.layout.data_bytes == 2 * elements + 40


@given(
    elements=st.integers(0, 20_000),
    blocks=st.integers(1, 4),
    done=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5000)), max_size=5),
)
def test_tiles_cover_every_element_once_and_start_at_blocks(tmp_path_factory, elements, blocks, done):
    path = tmp_path_factory.getbasetemp() / "tiles.safetensors"
    write_checkpoint(path, {"w": np.zeros(elements, np.float16), "n": np.zeros(7, np.int8)})
    plan = plan_for([path], tile_blocks=blocks)
    ranges = [(b * BLOCK_ELEMENTS, min(n, max(0, elements - b * BLOCK_ELEMENTS))) for b, n in done]
    tensor = plan.table.names.index("w")
    covered = np.zeros(elements, int)
    for start, length in ranges:
        covered[start : start + length] = 1
    for tile in plan.tiles(averaged=True, done={tensor: [r for r in ranges if r[1] > 0]}):
        assert tile.tensor == tensor
        assert 0 < tile.elements <= blocks * BLOCK_ELEMENTS
        covered[tile.start : tile.start + tile.elements] += 1
    assert (covered == 1).all()
    assert [t.tensor for t in plan.tiles(averaged=False)] == [plan.table.names.index("n")]


def test_fingerprint_is_the_same_for_every_budget_device_and_thread_count(tmp_path):
    runs = fine_tunes(tmp_path, 3)
    one = plan_of(runs, [1, 2, 3])
    assert one.fingerprint == plan_of(runs, [1, 2, 3], budget_bytes=80 * 2**20, workers=7, staged=True).fingerprint


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float32"}, {"shard_bytes": 3000}, {"weights": [1, 2, 4]}, {"weights": [3, 2, 1]}, {"normalize": False}],
)
def test_fingerprint_changes_with_what_decides_the_bits(tmp_path, change):
    runs = fine_tunes(tmp_path, 3)
    change = dict(change)
    weights = change.pop("weights", [1, 2, 3])
    assert plan_of(runs, [1, 2, 3]).fingerprint != plan_of(runs, weights, **change).fingerprint


def test_fingerprint_tells_names_apart_that_run_together(tmp_path):
    one = write_checkpoint(tmp_path / "a", {"ab": np.zeros(2, np.float32), "c": np.zeros(2, np.float32)})
    two = write_checkpoint(tmp_path / "b", {"a": np.zeros(2, np.float32), "bc": np.zeros(2, np.float32)})
    assert plan_of([one]).fingerprint != plan_of([two]).fingerprint


def test_only_tensors_that_meet_a_float64_are_summed_wide(tmp_path):
    tensors = {"a": np.zeros(2, np.float64), "b": np.zeros(2, np.float32)}
    plan = plan_of([write_checkpoint(tmp_path / "r", tensors)])
    assert {plan.table.names[t]: bool(plan.wide[t]) for t in range(2)} == {"a": True, "b": False}
    plan = plan_of([tmp_path / "r"], dtype="float64")
    assert all(bool(plan.wide[t]) for t in range(2))
