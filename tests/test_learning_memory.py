"""The memory promise of learned soups, measured: module, gradient and budget, for any number of ingredients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from factory import write_sparse

DRIVER = Path(__file__).resolve().parent / "learning_memory_driver.py"
MIB = 1 << 20
MATRICES = 8
SLACK = 2 * MIB  # activations, and what the allocator keeps of them
WIDTH = {"BF16": 1200, "F32": 1000, "F64": 700}  # 23, 32 and 31 MB each


def ingredients(folder: Path, count: int, dtype: str) -> list[str]:
    """Checkpoints that are holes: links to one file would be one inode, and one reading."""
    shape = (WIDTH[dtype], WIDTH[dtype])
    names = [f"layers.{i}.weight" for i in range(MATRICES)]
    return [
        str(write_sparse(folder / f"run{i:02d}.safetensors", dict.fromkeys(names, (dtype, shape))))
        for i in range(count)
    ]


def measure(folder: Path, count: int, dtype: str, **job: object) -> dict:
    job = {
        "ingredients": ingredients(folder, count, dtype), "dtype": dtype, "width": WIDTH[dtype], "matrices": MATRICES,
        "out": str(folder / "soup.safetensors"), "budget": 48 * MIB, "mode": "map", "limit": True, "steps": 2, **job,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(DRIVER), json.dumps(job)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(answer: dict, budget: int) -> None:
    assert answer["error"] is None
    assert answer["projected"] <= budget
    assert answer["peak"] <= budget + answer["gradient"] + SLACK
    assert answer["peak"] >= answer["gradient"], "the sampler saw the gradient"
    assert abs(answer["reported"] - answer["peak"]) < 24 * MIB


@pytest.mark.parametrize(
    ("dtype", "mode", "options"),
    [
        ("F32", "map", {"by": "model"}),
        pytest.param("BF16", "map", {"by": "tensor", "workers": 1}, marks=pytest.mark.slow),
        pytest.param("F32", "plain", {"by": "layer"}, marks=pytest.mark.slow),
        pytest.param("BF16", "ahead", {"by": "layer"}, marks=pytest.mark.slow),
        pytest.param("F64", "map", {"by": "layer"}, marks=pytest.mark.slow),
    ],
)
def test_learning_owns_its_budget_and_a_gradient_for_any_number_of_ingredients(tmp_path, dtype, mode, options):
    budget = (120 if mode == "plain" else 64) * MIB
    peaks = []
    for count in (2, 8, 32):
        folder = tmp_path / str(count)
        folder.mkdir()
        answer = measure(folder, count, dtype, mode=mode, options=options, budget=budget)
        check(answer, budget)
        peaks.append(answer["peak"])
    if mode != "plain":  # there, buffers for more ingredients use more of the budget
        assert max(peaks) - min(peaks) < 16 * MIB, "flat, though sixteen times as many are read"


@pytest.mark.parametrize("mode", ["plain", pytest.param("map", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_steps(tmp_path, mode):
    """What a step holds is given back at its end, not when Python's collector comes by."""
    budget = 120 * MIB
    answer = measure(tmp_path, 8, "F32", mode=mode, budget=budget, steps=15, options={"by": "layer"})
    check(answer, budget)
    assert answer["steps"] == 15


@pytest.mark.parametrize("kind", ["private", "shared", "private, limited"])
def test_the_proof_catches_memory_beyond_the_budget(tmp_path, kind):
    """The negative control: without it the test above might pass for the wrong reason."""
    budget = 64 * MIB
    answer = measure(
        tmp_path, 2, "F32", budget=budget, limit=kind == "private, limited", hog=kind.split(",")[0],
        hog_bytes=budget + 8 * MIB,
    )  # fmt: skip
    if kind == "private, limited":
        assert "MemoryError" in answer["error"]
    else:
        assert answer["peak"] > budget + answer["gradient"] + SLACK
