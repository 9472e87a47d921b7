"""Our adapters in the packages that they are for, in an environment of their own.

python benchmarks/environments.py --dir DIR
STREAMSOUP_PEERS=DIR pytest -m peer tests/test_host_packages.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from test_embedding import lm_eval_command, run_printed

pytestmark = pytest.mark.peer

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def python():
    folder = Path(os.environ.get("STREAMSOUP_PEERS", HERE.parent / ".bench-env"))
    found = folder / "lightning" / "bin" / "python"
    if not found.exists():
        pytest.fail(
            f"{found}: there is no environment of these packages. Run `python benchmarks/environments.py --dir DIR`, "
            "and the tests with STREAMSOUP_PEERS=DIR."
        )
    return found


def drive(python, what, folder):
    done = subprocess.run(
        [str(python), str(HERE / "hosts_driver.py"), what, str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_trainer_of_transformers(python, tmp_path):
    assert drive(python, "trainer", tmp_path) == {"all": True, "latest": True, "loaded": True, "moved": True}


def test_lightning_beside_its_own_average(python, tmp_path):
    found = drive(python, "lightning", tmp_path)
    assert found == {"same as theirs": True, "checkpoint": True, "validated": True, "averaged": 12, "steps": 12}


def test_lm_evaluation_harness_as_printed(python, tmp_path):
    drive(python, "checkpoints", tmp_path)
    done = run_printed(
        lm_eval_command(),
        tmp_path,
        {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
        **{"arc_easy": "toy", "--tasks": "--include_path tasks --tasks"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    decisions = json.loads((tmp_path / "soup" / "decisions.json").read_text())
    assert len(decisions["trials"]) == 2
