"""Learned soups: time and memory of a step, streamed, beside an implementation with all ingredients in memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import run_process, summary

from streamsoup.bench.ceilings import mapped_read_seconds
from streamsoup.bench.machine import warm
from streamsoup.bench.synthetic import checkpoint_bytes, make_checkpoints
from streamsoup.budget import available_cores, free_bytes

HERE = Path(__file__).resolve().parent
BUDGET = "256MiB"
COUNTS = (2, 8, 32)
_WARM = 8


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Every number of ingredients by model and by layer; those that fit, in memory too."""
    preset = "vit-50m" if small else "vit-g-463m"
    paths = make_checkpoints(preset, folder / "runs", ingredients=max(COUNTS))
    each = checkpoint_bytes(preset, "bf16")
    figures: dict[str, Any] = {"network_bytes": each, "budget": BUDGET, "streamed": {}, "memory": {}}
    figures["network"] = _several(folder, ["network"], paths[:1], repeats)
    files = [path / "model.safetensors" for path in paths[:_WARM]]
    for count in COUNTS:
        for by in ("model", "layer"):
            figures["streamed"][f"{count} {by}"] = _several(folder, ["streamed", "--by", by], paths[:count], repeats)
    warm(files)
    ceilings = [mapped_read_seconds(files, available_cores()) for _ in range(max(2, repeats))]
    figures["mapped_read_seconds"] = summary(ceilings)
    figures["mapped_read_bytes"] = sum(file.stat().st_size for file in files)
    most = min(max(COUNTS), int(free_bytes() * 0.8 / each) - 4)
    while most > _WARM:  # the largest number that the system does not kill
        try:
            figures["memory"][str(most)] = _several(folder, ["memory"], paths[:most], 1)
            break
        except SystemExit:
            most -= 2
    figures["memory"][str(_WARM)] = _several(folder, ["memory"], paths[:_WARM], 1)
    return figures


def _several(folder: Path, how: Sequence[str], paths: Sequence[Path], repeats: int) -> dict[str, Any]:
    for _ in range(2 if len(paths) <= _WARM else 0):  # once more: what was written last may push them out
        for path in paths:
            (path / "model.safetensors").read_bytes()
    command = [sys.executable, str(HERE / "learned_driver.py"), *how, "--budget", BUDGET, *map(str, paths)]
    runs = [run_process(command) for _ in range(max(1, min(repeats, 3)))]
    found = [json.loads(run.output.splitlines()[-1]) for run in runs]
    return {
        **found[0],
        "step_seconds": summary([f["step_seconds"] for f in found]),
        "above_module_bytes": max(f["above_module_bytes"] for f in found),
        "owned_bytes": max(run.owned_bytes for run in runs),
    }


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    alone = figures["network"]["above_module_bytes"]
    ceiling = figures["mapped_read_bytes"] / figures["mapped_read_seconds"]["median"]
    rows = [
        ("network", f"{figures['network_bytes'] / 2**20:,.0f} MiB in bfloat16; budget {figures['budget']}"),
        ("its gradient and what autograd holds, without learning", f"{alone / 2**20:,.0f} MiB"),
        ("mapped read, warm", f"{ceiling / 1e9:.1f} GB/s"),
    ]
    for name, found in figures["streamed"].items():
        count, by = name.split()
        seconds, read = found["step_seconds"]["median"], found["bytes_a_step"]
        swept = 2 * int(count) * figures["network_bytes"]
        rows.append(
            (
                f"{count} ingredients, by {by}: a step beside the network",
                f"{seconds:.2f} s, read {read / 1e9:.1f} GB, gone through {swept / seconds / 1e9:.1f} GB/s = "
                f"{swept / seconds / ceiling:.2f} of the mapped read",
            )
        )
        rows.append(
            (
                f"{count} ingredients, by {by}: owned",
                f"{found['above_module_bytes'] / 2**20:,.0f} MiB above the network "
                f"({(found['above_module_bytes'] - alone) / 2**20:+,.0f} beside training it)",
            )
        )
    for count, found in figures["memory"].items():
        rows.append(
            (
                f"{count} ingredients in memory, as published: a step, network included",
                f"{found['step_seconds']['median']:.2f} s, owned above the network "
                f"{found['above_module_bytes'] / 2**20:,.0f} MiB",
            )
        )
    return rows
