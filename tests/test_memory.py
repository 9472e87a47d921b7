"""The memory promise, measured: hard by RLIMIT_DATA, and by what the kernel counts as anonymous and shared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factory import realistic, write_checkpoint, write_sparse
from simmer import least_budget

import streamsoup
from streamsoup.checkpoints import open_checkpoints
from streamsoup.methods import linear
from streamsoup.planner import make_plan

DRIVER = Path(__file__).resolve().parent / "memory_driver.py"
MIB = 1 << 20


def measure(**job: object) -> dict:
    done = subprocess.run(
        [sys.executable, str(DRIVER), json.dumps(job)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def one_file(folder: Path, dtype: str = "BF16") -> str:
    """A checkpoint of 15 million elements, all holes: one large tensor and some smaller ones."""
    path = folder / f"{dtype}.safetensors"
    tensors = {"big": (dtype, (10_000_000,))} | {f"w{i}": (dtype, (1_000_003,)) for i in range(5)}
    return str(write_sparse(path, tensors))


@pytest.mark.parametrize(
    ("count", "dtype", "mode", "budget"),
    [
        (2, "BF16", "plain", 64 * MIB),
        (64, "BF16", "plain", 64 * MIB),
        (16, "BF16", "map", 64 * MIB),
        (30, "BF16", "plain", None),
        (4, "F64", "plain", 48 * MIB),
        (8, "F32", "map", 32 * MIB),
    ],
)
def test_a_run_owns_no_more_than_its_budget(tmp_path, count, dtype, mode, budget):
    path = one_file(tmp_path, dtype)
    budget = budget or least_budget([path] * count, read_mode=mode)
    answer = measure(
        ingredients=[path] * count, out=str(tmp_path / "soup"), budget=budget, mode=mode, warm=dtype, limit=True
    )
    assert answer["error"] is None
    assert answer["peak"] <= budget
    assert answer["projected"] <= budget
    assert answer["reported"] <= answer["projected"]
    assert answer["bytes_read"] == count * (15_000_015 * {"BF16": 2, "F32": 4, "F64": 8}[dtype])


@pytest.mark.parametrize("mode", ["map", "ahead", "plain"])
@pytest.mark.parametrize(
    ("count", "method", "parameters"),
    [
        (8, "ties", {"density": 0.3}),
        (40, "model_stock", {"cosine": "pairs"}),
        (4, "dare_ties", {"density": 0.3, "rescale": "l1"}),
        (3, "della", {"density": 0.5}),
    ],
)
def test_what_is_measured_and_merged_stays_in_the_budget(tmp_path, count, method, parameters, mode):
    path = str(write_sparse(tmp_path / "run.safetensors", {"w": ("BF16", (3000, 1000)), "v": ("BF16", (200_003,))}))
    base = str(write_sparse(tmp_path / "base.safetensors", {"w": ("BF16", (3000, 1000)), "v": ("BF16", (200_003,))}))
    options = {"method": method, "base": base, "parameters": parameters}
    budget = least_budget([path] * count, read_mode=mode, recipe=options)
    answer = measure(
        ingredients=[path] * count, out=str(tmp_path / "soup"), budget=budget, mode=mode, warm="BF16",
        limit=True, options=options,
    )  # fmt: skip
    assert answer["error"] is None
    assert answer["peak"] <= budget
    assert answer["reported"] <= answer["projected"] <= budget


@pytest.mark.parametrize("kind", ["private", "shared", "private, limited"])
def test_the_proof_catches_memory_beyond_the_budget(tmp_path, kind):
    """The negative control: without it the test above might pass for the wrong reason."""
    path = one_file(tmp_path)
    budget = 64 * MIB
    answer = measure(
        ingredients=[path] * 2, out=str(tmp_path / "soup"), budget=budget, mode="plain", warm="BF16",
        limit=kind == "private, limited", hog=kind.split(",")[0], hog_bytes=budget + 32 * MIB,
    )  # fmt: skip
    if kind == "private, limited":
        assert "MemoryError" in answer["error"]
    else:
        assert answer["peak"] > budget


def test_the_reported_peak_is_what_the_kernel_counts(tmp_path):
    path = one_file(tmp_path)
    answer = measure(
        ingredients=[path] * 4, out=str(tmp_path / "soup"), budget=128 * MIB, mode="plain", warm="BF16", limit=False
    )
    assert answer["error"] is None
    assert abs(answer["reported"] - answer["peak"]) < 24 * MIB


@pytest.mark.parametrize("alike", [True, False])
def test_planning_keeps_to_64_bytes_an_ingredient_and_tensor(tmp_path, alike):
    ingredients, tensors = 24, 2_000
    answer = measure_planning(tmp_path, ingredients=ingredients, tensors=tensors, alike=alike)
    # Beside it, once: the names themselves, and the layout with its headers.
    assert answer["grown"] <= 64 * ingredients * tensors + 400 * tensors + MIB
    assert answer["metadata_bytes"] >= answer["grown"] * 0.5, "the forecast is of the right size"


def measure_planning(folder: Path, *, ingredients: int, tensors: int, alike: bool) -> dict:
    """Plan ingredients with equal headers, or all in different orders, so that none shares a table with another."""
    import tracemalloc

    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.weight" for i in range(tensors)]
    paths = []
    for k in range(ingredients):
        order = names if alike or k == 0 else [names[i] for i in rng.permutation(tensors)]
        path = write_sparse(folder / f"r{k}.safetensors", dict.fromkeys(order, ("BF16", (2, 3))))
        paths.append(str(path))
    write_checkpoint(folder / "warm", {"w": np.zeros(1, np.float32)})
    open_checkpoints([str(folder / "warm")])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        plan = make_plan(
            open_checkpoints(paths), linear([1.0] * ingredients, normalize=True), budget_bytes=10**9, workers=2,
            staged=False,
        )  # fmt: skip
        digests = 8 * ingredients * tensors  # made by the run, and forecast
        grown = tracemalloc.get_traced_memory()[0] - before + digests
        return {"metadata_bytes": plan.metadata_bytes, "grown": grown}
    finally:
        tracemalloc.stop()


def test_a_tensor_far_larger_than_the_budget_is_split(tmp_path):
    path = str(write_sparse(tmp_path / "x.safetensors", {"w": ("F32", (20_000_000,))}))
    budget = least_budget([path] * 3)
    assert budget < 80_000_000 / 2
    result = streamsoup.soup([path] * 3, tmp_path / "soup", budget_bytes=budget)
    assert result.projected_peak_bytes <= budget
    assert result.bytes_written == 80_000_000


def test_small_checkpoints_measure_within_what_was_projected(tmp_path, read_mode):
    paths = [write_checkpoint(tmp_path / f"r{i}", realistic(i, {"w": (100_000,)})) for i in range(5)]
    result = streamsoup.soup(paths, tmp_path / "soup", read_mode=read_mode)
    assert result.measured_peak_bytes <= result.projected_peak_bytes
