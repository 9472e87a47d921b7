"""50,000 small tensors, and many shards: what a tensor and a file cost beside their bytes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import run_process, summary

from streamsoup.bench.machine import warm
from streamsoup.bench.synthetic import make_checkpoints

KEYS = ("seconds", "engine_seconds")


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Time soups of 8 checkpoints of 50,000 tensors, and of 8 checkpoints of 30 shards."""
    found = {}
    for name, preset, shards in (
        ("many_tensors", "small-20mb" if small else "moe-many-tensors", 1),
        ("many_shards", "small-20mb" if small else "vit-50m", 30),
    ):
        paths = make_checkpoints(preset, folder / name, ingredients=8, shards=shards)
        warm([file for path in paths for file in path.glob("*.safetensors")])
        soup = folder / "soup"
        command = [sys.executable, "-m", "streamsoup", "soup", *map(str, paths), "-o", str(soup), "--json"]
        ours = []
        for _ in range(repeats):
            done = run_process(command)
            ours.append({**json.loads(done.output), "process_seconds": done.seconds})
            shutil.rmtree(soup)
        found[name] = {
            "tensors": ours[0]["tensors"],
            "ingredients": 8,
            "read_bytes": ours[0]["bytes_read"],
            "peak_bytes": max(o["measured_peak_bytes"] for o in ours),
            **{key: summary([o[key] for o in ours]) for key in (*KEYS, "process_seconds")},
        }
        shutil.rmtree(folder / name)
    return found


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    many, shards = figures["many_tensors"], figures["many_shards"]
    each = many["seconds"]["median"] / many["tensors"] / many["ingredients"] * 1e6
    return [
        (f"8 x {many['tensors']:,} tensors, {many['read_bytes'] / 1e6:.0f} MB, whole process",
         f"{many['process_seconds']['median']:.1f} s"),
        ("  a tensor and ingredient, from the first header on (under 20 us)", f"{each:.1f} us"),
        (f"8 x 30 shards, {shards['read_bytes'] / 1e9:.2f} GB, whole process",
         f"{shards['process_seconds']['median']:.2f} s"),
    ]  # fmt: skip
