"""float16 by instructions, and by integers where there are none: the same bits, and processors without make soups."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from streamsoup.kernels import halves
from streamsoup.kernels.vectors import F32, I16, I64, load, store, vector

SOUPS = """
import sys
import numpy as np
from factory import DTYPES, write_checkpoint
from pathlib import Path
import streamsoup
home = Path(sys.argv[1])
for kinds in (["F16", "F16"], ["BF16", "BF16"], ["F32", "F32"], ["F16", "BF16"]):
    rng, name = np.random.default_rng(3), "-".join(kinds)
    places = [home / f"{name}-{k}" for k in range(2)]
    for place, kind in zip(places, kinds):
        numbers = rng.standard_normal(5001) * 10.0 ** rng.integers(-8, 4, 5001)
        write_checkpoint(place, {"w": numbers.astype(DTYPES[kind])})
    for weights in ([1, 1], [0.3, 0.5]):
        made = streamsoup.soup(places, home / f"soup-{name}-{weights[0]}", weights=weights)
        print(name, weights, made.content_digests)
"""


def _loop(convert, source, target, lanes):
    """Compile a conversion of many numbers, `lanes` at a time (0: one that is no vector)."""
    bits = {I16: 16, F32: 32}

    @intrinsic
    def step(typingctx, begin, end, count):
        def generate(context, builder, signature, arguments):
            begin, end, count = arguments
            with cgutils.for_range(builder, count) as loop:
                at = builder.mul(loop.index, ir.Constant(I64, max(lanes, 1) * bits[source] // 8))
                to = builder.mul(loop.index, ir.Constant(I64, max(lanes, 1) * bits[target] // 8))
                one = load(builder, builder.add(begin, at), vector(source, lanes) if lanes else source)
                store(builder, convert(builder, one), builder.add(end, to))
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, types.int64), generate

    @numba.njit
    def run(begin, end, count):
        step(begin, end, count)

    def call(numbers):
        numbers = np.ascontiguousarray(numbers)
        found = np.empty(len(numbers), np.uint16 if target == I16 else np.uint32)
        run(np.uint64(numbers.ctypes.data), np.uint64(found.ctypes.data), len(numbers) // max(lanes, 1))
        return found

    return call


@pytest.mark.parametrize("convert", [halves.singles_from_halves, halves._decoded])
@pytest.mark.parametrize("lanes", [0, 1, 4, 8])
def test_all_halves_become_the_same_singles(convert, lanes):
    every = np.arange(1 << 16, dtype=np.uint16)
    wanted = every.view(np.float16).astype(np.float32).view(np.uint32)
    nan = (every & 0x7FFF) > 0x7C00
    word = every[nan].astype(np.uint32)
    wanted[nan] = (word & 0x8000) << 16 | 0x7FC00000 | (word & 0x3FF) << 13
    assert (_loop(convert, I16, F32, lanes)(every) == wanted).all()


@pytest.mark.parametrize("convert", [halves.halves_from_singles, halves._encoded])
@pytest.mark.parametrize("lanes", [0, 8])
def test_singles_are_rounded_to_the_nearest_even_halves(convert, lanes):
    # All signs, exponents and upper mantissas, with whatever decides the rounding below: no tie but 0x1000.
    upper = np.arange(1 << 19, dtype=np.uint32) << 13
    run = _loop(convert, F32, I16, lanes)
    for lower in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF):
        words = upper | np.uint32(lower)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            wanted = words.view(np.float32).astype(np.float16).view(np.uint16)
        nan = (words & 0x7FFFFFFF) > 0x7F800000
        wanted[nan] = words[nan] >> 16 & 0x8000 | 0x7E00 | words[nan] >> 13 & 0x3FF
        assert (run(words) == wanted).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other names")
def test_an_old_processor_makes_the_same_soups(tmp_path):
    found = []
    old = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for number, settings in enumerate(({}, old)):
        here = tmp_path / str(number)
        here.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SOUPS, str(here)],
            env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not done.returncode, done.stderr
        found.append(done.stdout)
    assert found[0].count("\n") == 8
    assert found[0] == found[1]
