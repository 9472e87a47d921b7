"""Adapters as peft saves them, against its `merge_and_unload`.

    python benchmarks/environments.py --dir DIR
    STREAMSOUP_PEERS=DIR pytest -m peer tests/test_peft_parity.py

mergekit's environment has peft.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from factory import read_checkpoint

import streamsoup

pytestmark = pytest.mark.peer

HERE = Path(__file__).resolve().parent
CASES = ("linear", "all", "rslora", "patterns", "saved", "biases", "transposed", "float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = Path(os.environ.get("STREAMSOUP_PEERS", HERE.parent / ".bench-env"))
    python = folder / "mergekit" / "bin" / "python"
    if not python.exists():
        pytest.fail(
            f"{python}: there is no environment with peft. Run `python benchmarks/environments.py --dir DIR`, and the "
            "tests with STREAMSOUP_PEERS=DIR."
        )
    out = tmp_path_factory.mktemp("peft")
    done = subprocess.run(
        [str(python), str(HERE / "peft_driver.py"), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_merged_weights(tmp_path, made, case):
    """Of one adapter: a soup of it alone. peft multiplies matrices in another order, so the last bits may differ."""
    folder = made / case
    streamsoup.soup([f"{folder}/base.safetensors+{folder}/lora"], tmp_path / "out")
    found, expected = read_checkpoint(tmp_path / "out"), read_checkpoint(folder / "merged.safetensors")
    base = read_checkpoint(folder / "base.safetensors")
    assert found.keys() == expected.keys() == base.keys()
    changed = 0
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        bound = 1e-6 if array.dtype == np.float32 else 1e-14
        np.testing.assert_allclose(found[name], array, rtol=0, atol=bound * np.abs(array).max(), err_msg=name)
        changed += not np.array_equal(found[name], base[name])
    assert changed >= 2


def test_every_case_is_tested(made):
    assert {path.name for path in made.iterdir()} == set(CASES)
