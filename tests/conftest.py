"""What all tests share: the folder of the exact reference on the path, small fixtures, quiet Hypothesis deadlines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "kernels"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; read when huggingface_hub is imported

# Two noisy cores: no deadlines; a first example may compile.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(params=["cpu", "torch:cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Both backends."""
    return str(request.param)


@pytest.fixture(params=["map", "ahead", "plain"])
def read_mode(request: pytest.FixtureRequest) -> str:
    """All ways of reading."""
    return str(request.param)


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own, in the test's folder."""

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "streamsoup", *map(str, arguments)],
            cwd=options.pop("cwd", tmp_path),
            env={**os.environ, **options.pop("env", {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )

    return run
