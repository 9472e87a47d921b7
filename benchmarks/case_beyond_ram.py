"""More checkpoints than memory holds, from a cold disk: ViT-G/14 as often as twice the memory takes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
from measure import run_process, summary

from streamsoup.bench.machine import drop, resident_share
from streamsoup.bench.synthetic import checkpoint_bytes, make_checkpoints

HERE = Path(__file__).resolve().parent
MODES = ("dontcache", "buffered", "direct")
CACHED_BYTES = 2 << 30  # of other files, cached before: how much of them is still cached after?


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Interleave ours and plain calls; a file of somebody else's is in the page cache before each run of ours."""
    preset, dtype = ("small-20mb", "bf16") if small else ("vit-g", "bf16")
    memory = psutil.virtual_memory().total
    each = checkpoint_bytes(preset, dtype)
    count = 4 if small else int(2.05 * memory / each) + 1
    room = int((shutil.disk_usage(folder).free - CACHED_BYTES) / each) - 3
    count = min(count, room)
    paths = make_checkpoints(preset, folder / "runs", ingredients=count, dtype=dtype)
    files = [path / "model.safetensors" for path in paths]
    other = folder / "other"
    with other.open("wb") as file:
        for _ in range(0, (1 << 20) if small else CACHED_BYTES, 1 << 20):
            file.write(bytes(1 << 20))
    soup = folder / "soup"
    command = [sys.executable, "-m", "streamsoup", "soup", *map(str, paths), "-o", str(soup), "--json"]
    ours: list[dict[str, Any]] = []
    kept, plain = [], {mode: [] for mode in MODES}
    owned = 0
    for number in range(max(1, repeats // 2)):
        drop(files)
        with other.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
        before = resident_share([other])
        done = run_process(command)
        ours.append(json.loads(done.output))
        owned = max(owned, done.owned_bytes)
        kept.append(resident_share([other]) / before)
        shutil.rmtree(soup)
        for mode in MODES if number == 0 else MODES[:1]:
            drop(files)
            floor = [sys.executable, str(HERE / "floor.py"), mode, *map(str, files), "--threads", "8"]
            output = run_process([*floor, "--write-bytes", str(each), "--dir", str(folder)]).output
            plain[mode].append(json.loads(output)["seconds"])
    return {
        "preset": preset,
        "ingredients": count,
        "read_bytes": each * count,
        "write_bytes": each,
        "memory_bytes": memory,
        "ours_engine_seconds": summary([o["engine_seconds"] for o in ours]),
        "ours_stage_seconds": {k: summary([o["stage_seconds"][k] for o in ours]) for k in ours[0]["stage_seconds"]},
        "ours_measured_peak_bytes": max(o["measured_peak_bytes"] for o in ours),
        "ours_process_owned_bytes": owned,
        "others_still_cached": summary(kept),
        "plain_seconds": {mode: summary(seconds) for mode, seconds in plain.items()},
    }


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    gigabytes = figures["read_bytes"] / 1e9
    engine = figures["ours_engine_seconds"]["median"]
    best = min(values["median"] for values in figures["plain_seconds"].values())
    rows = [
        ("ingredients", f"{figures['ingredients']} x {figures['preset']}, {gigabytes:.1f} GB, cold, "
         f"{figures['read_bytes'] / figures['memory_bytes']:.1f} times the memory"),
        ("ours, engine", f"{engine:.1f} s ({gigabytes / engine:.2f} GB/s)"),
    ]  # fmt: skip
    for mode, values in figures["plain_seconds"].items():
        rows.append((f"plain calls, {mode}", f"{values['median']:.1f} s ({gigabytes / values['median']:.2f} GB/s)"))
    return [
        *rows,
        ("ours / best plain rate (at least 0.95)", f"{best / engine:.2f}"),
        ("other files: still cached of what was", f"{figures['others_still_cached']['median']:.0%}"),
        ("peak owned, above start / whole process", f"{figures['ours_measured_peak_bytes'] / 2**20:.0f} MiB / "
         f"{figures['ours_process_owned_bytes'] / 2**20:.0f} MiB"),
    ]  # fmt: skip
