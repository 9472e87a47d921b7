"""A uniform soup from a cold page cache, against plain calls that read and write the same bytes at the same time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import run_process, summary

from streamsoup.bench.machine import drop
from streamsoup.bench.synthetic import make_checkpoints

HERE = Path(__file__).resolve().parent
MODES = ("buffered", "dontcache", "direct")


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Interleave ours and the plain calls; caches are dropped before each."""
    paths = make_checkpoints("vit-50m" if small else "vit-g-463m", folder / "runs", ingredients=8)
    files = [path / "model.safetensors" for path in paths]
    write_bytes = files[0].stat().st_size
    soup = folder / "soup"
    command = [sys.executable, "-m", "streamsoup", "soup", *map(str, paths), "-o", str(soup), "--json"]
    run_process(command)
    shutil.rmtree(soup)
    ours: list[dict[str, Any]] = []
    plain: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        drop(files)
        ours.append(json.loads(run_process(command).output))
        shutil.rmtree(soup)
        for mode in MODES:
            drop(files)
            floor = [sys.executable, str(HERE / "floor.py"), mode, *map(str, files), "--threads", "8"]
            output = run_process([*floor, "--write-bytes", str(write_bytes), "--dir", str(folder)]).output
            plain[mode].append(json.loads(output)["seconds"])
    return {
        "cache": "cold: sync and POSIX_FADV_DONTNEED on every file before each run",
        "read_bytes": sum(file.stat().st_size for file in files),
        "write_bytes": write_bytes,
        "read_modes": sorted({o["read_mode"] for o in ours}),
        "ours_engine_seconds": summary([o["engine_seconds"] for o in ours]),
        "ours_seconds": summary([o["seconds"] for o in ours]),
        "plain_seconds": {mode: summary(values) for mode, values in plain.items()},
    }


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    gigabytes = figures["read_bytes"] / 1e9
    engine = figures["ours_engine_seconds"]["median"]
    rows = [
        ("ingredients", f"{gigabytes:.2f} GB, cold"),
        (f"ours, engine ({', '.join(figures['read_modes'])} reads)", f"{engine:.2f} s ({gigabytes / engine:.2f} GB/s)"),
    ]
    best = min(values["median"] for values in figures["plain_seconds"].values())
    for mode, values in figures["plain_seconds"].items():
        rows.append((f"plain calls, {mode}", f"{values['median']:.2f} s ({gigabytes / values['median']:.2f} GB/s)"))
    return [*rows, ("ours / best plain rate (at least 0.95)", f"{best / engine:.2f}")]
