"""A uniform soup from a warm page cache, against a hand-written loop and the machine's floor."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import run_process, settle, summary

from streamsoup.bench.machine import warm
from streamsoup.bench.synthetic import make_checkpoints

HERE = Path(__file__).resolve().parent


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Interleave ours, the floor and the loop, and return seconds, bytes and peaks."""
    paths = make_checkpoints("vit-50m" if small else "vit-g-463m", folder / "runs", ingredients=8)
    files = [path / "model.safetensors" for path in paths]
    warm(files)
    read_bytes = sum(file.stat().st_size for file in files)
    write_bytes = files[0].stat().st_size
    soup, loop_out = folder / "soup", folder / "loop.safetensors"
    command = [sys.executable, "-m", "streamsoup", "soup", *map(str, paths), "-o", str(soup), "--json"]
    run_process(command)  # compiles, if need be
    ours: list[dict[str, Any]] = []
    loops, floors = [], []
    for _ in range(repeats):
        shutil.rmtree(soup)
        settle(small)
        mine = run_process(command)
        ours.append({**json.loads(mine.output), "process_seconds": mine.seconds, "owned": mine.owned_bytes})
        floor = [sys.executable, str(HERE / "floor.py"), "warm", *map(str, files), "--write-bytes", str(write_bytes)]
        settle(small)
        floors.append(json.loads(run_process([*floor, "--dir", str(folder)]).output))
        loop = [sys.executable, str(HERE / "torch_loops.py"), "uniform", str(loop_out), *map(str, paths)]
        settle(small)
        loops.append(run_process(loop))
        loop_out.unlink()
    stages = {k: summary([o["stage_seconds"][k] for o in ours]) for k in ours[0]["stage_seconds"]}
    return {
        "cache": "warm: every file was read once before",
        "read_bytes": read_bytes,
        "write_bytes": write_bytes,
        "ours_process_seconds": summary([o["process_seconds"] for o in ours]),
        "ours_engine_seconds": summary([o["engine_seconds"] for o in ours]),
        "ours_stage_seconds": stages,
        "ours_measured_peak_bytes": max(o["measured_peak_bytes"] for o in ours),
        "ours_process_owned_bytes": max(o["owned"] for o in ours),
        "floor_read_seconds": summary([f["read_seconds"] for f in floors]),
        "floor_write_seconds": summary([f["write_seconds"] for f in floors]),
        "floor_write_and_sync_seconds": summary([f["write_and_sync_seconds"] for f in floors]),
        "loop_process_seconds": summary([x.seconds for x in loops]),
        "loop_owned_bytes": max(x.owned_bytes for x in loops),
        "loop_resident_bytes": max(x.resident_bytes for x in loops),
    }


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    process = figures["ours_process_seconds"]["median"]
    engine = figures["ours_engine_seconds"]["median"]
    read = figures["floor_read_seconds"]["median"]
    floor = read + figures["floor_write_and_sync_seconds"]["median"]
    loop = figures["loop_process_seconds"]["median"]
    gigabytes = figures["read_bytes"] / 1e9
    return [
        ("ingredients", f"{gigabytes:.2f} GB, warm"),
        ("ours, whole process", f"{process:.2f} s"),
        ("ours, engine", f"{engine:.2f} s ({gigabytes / engine:.1f} GB/s, synced to disk)"),
        ("floor: mapped read", f"{read:.2f} s ({gigabytes / read:.1f} GB/s)"),
        ("floor: mapped read, then write and sync", f"{floor:.2f} s"),
        ("ours, engine / floor (at most 1.25)", f"{engine / floor:.2f}"),
        ("hand-written torch loop, whole process (not synced)", f"{loop:.2f} s"),
        ("loop / ours, whole processes (at least 15)", f"{loop / process:.1f}"),
        ("peak owned, ours above start / whole process", f"{_mib(figures['ours_measured_peak_bytes'])} / "
         f"{_mib(figures['ours_process_owned_bytes'])}"),
        ("peak owned / resident, loop",
         f"{_mib(figures['loop_owned_bytes'])} / {_mib(figures['loop_resident_bytes'])}"),
    ]  # fmt: skip


def _mib(value: float) -> str:
    return f"{value / 2**20:.0f} MiB"
