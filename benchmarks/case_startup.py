"""How long one waits before anything happens."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from measure import run_process, summary

from streamsoup.bench.synthetic import make_checkpoints


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Time help, a small soup with compiled kernels, and the first soup ever."""
    program = [sys.executable, "-m", "streamsoup"]
    paths = make_checkpoints("small-20mb", folder / "runs", ingredients=4)
    soup = folder / "soup"
    command = [*program, "soup", *map(str, paths), "-o", str(soup), "--quiet"]
    first, later, helps = [], [], []
    for number in range(repeats):
        cache = {"NUMBA_CACHE_DIR": str(folder / f"cache{number}")}
        first.append(run_process(command, environment=cache).seconds)
        shutil.rmtree(soup)
        later.append(run_process(command, environment=cache).seconds)
        shutil.rmtree(soup)
        helps.append(run_process([*program, "--help"]).seconds)
    return {
        "bytes_each": (paths[0] / "model.safetensors").stat().st_size,
        "help_seconds": summary(helps),
        "first_ever_seconds": summary(first),
        "compiled_seconds": summary(later),
    }


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    return [
        ("streamsoup --help (under 0.2 s)", f"{figures['help_seconds']['median']:.2f} s"),
        ("soup of four 20 MB checkpoints, compiled (under 1.5 s)", f"{figures['compiled_seconds']['median']:.2f} s"),
        ("the first soup ever, compiling (under 10 s)", f"{figures['first_ever_seconds']['median']:.2f} s"),
    ]
