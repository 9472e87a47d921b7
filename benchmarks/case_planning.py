"""Planning many ingredients with many tensors, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import summary

_PLAN = """
import sys, time, json
from streamsoup.budget import owned_bytes
from streamsoup.soup_plan import plan_soup
from streamsoup.execution import Execution
from streamsoup.recipe import make_recipe
import numpy, psutil, yaml, natsort
recipe = make_recipe(sys.argv[1:])
before, began = owned_bytes(), time.perf_counter()
plan, _ = plan_soup(recipe, None, Execution(read_mode="map"))
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "owned": owned_bytes() - before, "forecast": plan.metadata_bytes,
                  "tensors": len(plan.table), "ingredients": len(plan.checkpoints)}))
"""


def run(folder: Path, *, repeats: int, small: bool) -> dict[str, Any]:
    """Plan with equal headers, and with headers that all differ."""
    ingredients, tensors = (8, 2000) if small else (64, 20_000)
    figures: dict[str, Any] = {}
    for kind in ("equal", "different"):
        paths = [_write(folder, kind, i, tensors) for i in range(ingredients)]
        samples = []
        for _ in range(repeats):
            output = subprocess.run([sys.executable, "-c", _PLAN, *paths], check=True, capture_output=True, text=True)
            samples.append(json.loads(output.stdout))
        each = ingredients * tensors
        figures[kind] = {
            "seconds": summary([s["seconds"] for s in samples]),
            "forecast_bytes_each": samples[0]["forecast"] / each,
            "owned_bytes_each": max(s["owned"] for s in samples) / each,
        }
    return {"ingredients": ingredients, "tensors": tensors, **figures}


def _write(folder: Path, kind: str, number: int, tensors: int) -> str:
    """Write a file of tiny tensors; where headers differ, so does the order of the tensors."""
    order = list(range(tensors))
    if kind == "different":
        order = order[number:] + order[:number]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for place, i in enumerate(order):
        name = f"model.layers.{i // 100}.mlp.experts.{i % 100}.down_proj.weight"
        header[name] = {"dtype": "BF16", "shape": [1, 4], "data_offsets": [8 * place, 8 * place + 8]}
    text = json.dumps(header).encode()
    path = folder / f"{kind}{number}.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8 * tensors))
    return str(path)


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows to read."""
    size = f"{figures['ingredients']} x {figures['tensors']:,} tensors"
    rows = []
    for kind in ("equal", "different"):
        found = figures[kind]
        rows.append((f"{size}, {kind} headers (under 10 s)", f"{found['seconds']['median']:.2f} s"))
        rows.append(
            (
                "  bytes an ingredient and tensor (at most 64)",
                f"{found['forecast_bytes_each']:.1f} forecast, {found['owned_bytes_each']:.1f} owned",
            )
        )
    return rows
