"""The tables of the README are those of the committed results, and the generator makes what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from streamsoup.bench.synthetic import make_checkpoints
from streamsoup.checkpoints import open_checkpoints

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_tables_of_the_readme_agree_with_the_results():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<!-- bench:soup-warm -->" in (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("shards", "dtype"), [(1, "bf16"), (3, "f32"), (1, "f16")])
def test_synthetic_checkpoints_open_and_differ(tmp_path, shards, dtype):
    make_checkpoints("small-20mb", tmp_path, ingredients=2, dtype=dtype, shards=shards)
    first, second = open_checkpoints([str(tmp_path / "run00"), str(tmp_path / "run01")])
    assert len(first.shards) == shards
    assert first.table.names == second.table.names
    assert Path(first.shards[0].path).read_bytes() != Path(second.shards[0].path).read_bytes()
