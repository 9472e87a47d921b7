"""The fused GPU kernel: interpreted it has the bits of the other two, and compiled it holds no contraction."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from streamsoup.kernels import triton_combine

HERE = Path(__file__).resolve().parent
CHECKS = (
    "pairs",
    "sizes",
    "singles",
    "patterns",
    "rounding",
    "places",
    "mixtures",
    "contraction",
    "gram",
    "memory",
    "soup",
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def answer(script: str, *arguments: str, **environment: str) -> str:
    """Run a script with Triton in the state that `environment` says, and return what it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize("checks", [CHECKS[:1], CHECKS[1:2], CHECKS[2:4], CHECKS[4:]], ids="-".join)
def test_interpreted_kernel_has_the_bits_digests_and_counts_of_the_others(checks):
    assert answer("triton_driver.py", "cpu", *checks, TRITON_INTERPRET="1").split() == list(checks)


@pytest.mark.gpu
def test_compiled_kernel_has_the_bits_digests_and_counts_of_the_others():
    assert answer("triton_driver.py", "cuda", *CHECKS).split() == list(CHECKS)


@needs_triton
def test_it_compiles_for_every_dtype_without_contraction_flushing_or_reciprocals(tmp_path):
    result = json.loads(answer("triton_compiler.py", TRITON_CACHE_DIR=str(tmp_path)))
    assert len(result["found"]) == 24
    for found in result["found"]:
        names: dict[str, Any] = {n: count for n, count in found["operations"].items() if n.endswith("f64")}
        # Plain mul.f64 and add.f64 might still be contracted by ptxas, so all must name their rounding.
        assert set(names) <= {"add.rn.f64", "sub.rn.f64", "mul.rn.f64", "div.rn.f64"}, found
        assert names["div.rn.f64"] > 0
        assert names["mul.rn.f64"] > 0
        assert found["flushes"] == 0
        if found["WHOLE"] and found["FIRST"] not in range(4, 8):
            assert found["two words at once"] > 0, found
    for found in result["gram"]:
        names = {name for name in found["operations"] if name.endswith("f64")}
        assert names <= {"add.rn.f64", "sub.rn.f64", "mul.rn.f64"}, found
        assert found["flushes"] == 0
    for found in result["single"]:
        names = {name.removesuffix("x2") for name in found["operations"] if not name.endswith("f64")}
        assert names == {"add.rn.f32", "mul.rn.f32", "div.rn.f32"}, found
        # The quotients of a thread's eight elements, and nothing for each ingredient.
        assert found["to float64"] <= 8, found
        assert found["flushes"] == 0
    # This test would notice one.
    assert result["fused"]["operations"]["fma.rn.f64"] > 0
    assert result["fused single"]["operations"]["fma.rn.f32"] > 0


def test_without_an_interpreter_the_cpu_is_left_to_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_combine.is_available(torch.device("cpu"))


def test_where_the_kernel_cannot_be_launched_torch_takes_its_place(monkeypatch, caplog):
    def trouble():
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton_combine, "_kernel", trouble)
    assert not triton_combine._works.__wrapped__(torch.device("cpu"))
    assert "no C compiler" in caplog.text


def test_triton_is_imported_only_where_it_is_used():
    program = (
        "import sys, torch; from streamsoup.kernels import triton_combine as t; "
        "t.is_available(torch.device('cpu')); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False"]
