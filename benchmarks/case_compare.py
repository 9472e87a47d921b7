"""A comparison of checkpoints, warm and cold, against plain reads of the same bytes in the same run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from measure import run_process, summary

from streamsoup.bench.ceilings import DISK_THREADS, mapped_read_seconds, plain_read_seconds
from streamsoup.bench.machine import drop, warm
from streamsoup.bench.synthetic import make_checkpoints
from streamsoup.budget import available_cores

MODES = ("buffered", "dontcache")


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Interleave ours and the plain reads; caches are dropped before each cold one."""
    paths = make_checkpoints("vit-50m" if small else "vit-g-463m", folder / "runs", ingredients=8)
    files = [path / "model.safetensors" for path in paths]
    command = [sys.executable, "-m", "streamsoup", "inspect", "--compare", *map(str, paths), "--json"]
    run_process(command)  # compiles, if need be
    found: dict[str, list[dict[str, Any]]] = {"warm": [], "cold": []}
    mapped: list[float] = []
    plain: dict[str, list[float]] = {mode: [] for mode in MODES}

    def ours(cache: str) -> None:
        done = run_process(command)
        found[cache].append({**json.loads(done.output), "process_seconds": done.seconds, "owned": done.owned_bytes})

    warm(files)
    for _ in range(repeats):
        mapped.append(mapped_read_seconds(files, available_cores()))
        ours("warm")
    for _ in range(repeats):
        for mode in MODES:
            drop(files)
            plain[mode].append(plain_read_seconds(files, DISK_THREADS, mode=mode))
        drop(files)
        ours("cold")
    return {
        "read_bytes": sum(file.stat().st_size for file in files),
        "ingredients": len(files),
        "read_modes": {cache: sorted({o["read_mode"] for o in runs}) for cache, runs in found.items()},
        "engine_seconds": {cache: summary([o["engine_seconds"] for o in runs]) for cache, runs in found.items()},
        "process_seconds": {cache: summary([o["process_seconds"] for o in runs]) for cache, runs in found.items()},
        "process_owned_bytes": max(o["owned"] for runs in found.values() for o in runs),
        "mapped_read_seconds": summary(mapped),
        "plain_read_seconds": {mode: summary(values) for mode, values in plain.items()},
    }


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    gigabytes = figures["read_bytes"] / 1e9

    def rate(values: dict[str, Any]) -> str:
        return f"{values['median']:.2f} s ({gigabytes / values['median']:.1f} GB/s)"

    engine = figures["engine_seconds"]
    plain = figures["plain_read_seconds"]
    best = min(values["median"] for values in plain.values())
    return [
        (f"{figures['ingredients']} ingredients", f"{gigabytes:.2f} GB"),
        ("warm: engine", rate(engine["warm"])),
        ("warm: whole process", f"{figures['process_seconds']['warm']['median']:.2f} s"),
        ("warm: mapped read, nothing computed", rate(figures["mapped_read_seconds"])),
        (f"cold: engine ({', '.join(figures['read_modes']['cold'])} reads)", rate(engine["cold"])),
        *((f"cold: plain reads, {mode}", rate(values)) for mode, values in plain.items()),
        ("cold: engine / best plain rate (at least 0.9)", f"{best / engine['cold']['median']:.2f}"),
        ("peak owned, whole process", f"{figures['process_owned_bytes'] / 2**20:.0f} MiB"),
    ]
