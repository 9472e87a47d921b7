"""Plans and results of soups, in words."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from streamsoup.methods.catalogue import METHODS
from streamsoup.units import format_binary, format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from streamsoup.checkpoints import LeftOut
    from streamsoup.device_share import DeviceShare
    from streamsoup.execution import SoupResult
    from streamsoup.plan import Plan
    from streamsoup.recipe import Ingredient, Recipe


def print_plan(
    plan: Plan, recipe: Recipe, mode: str, shares: Sequence[DeviceShare], device: str, args: argparse.Namespace
) -> None:
    """Print what would be done; `shares`: what it takes of each device's memory."""
    copied = sum(not plan.is_averaged(t) for t in range(len(plan.table)))
    tiling = plan.tiling
    facts: dict[str, Any] = {
        "method": recipe.label,
        "ingredients": [{"path": i.path, "weight": i.weight} for i in recipe.ingredients],
        "base": recipe.base,
        **naming_json(plan.touched, plan.left_out),
        "sweeps": plan.method.sweeps + plan.method.whole_sweeps,
        "accumulate": plan.accumulate,
        "tensors": len(plan.table),
        "copied_tensors": copied,
        "parameters": plan.parameters,
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "shards": len(plan.layout.shards),
        "tile_elements": tiling.tile_elements,
        "group": tiling.group,
        "threads": tiling.workers,
        "projected_peak_bytes": plan.projected_peak_bytes,
        "metadata_bytes": plan.metadata_bytes,
        "budget_bytes": plan.budget_bytes,
        "read_mode": mode,
        "device": device,
        "devices": [share.to_json() for share in shares],
        "notes": list(plan.notes),
    }
    if args.json:
        print(json.dumps(facts))
        return
    if recipe.method == "convert":
        print("conversion of")
    else:
        print(f"{recipe.label} soup of {len(recipe.ingredients)} checkpoints, added in this order:")
    roles = [] if recipe.base is None else ["base"]
    roles += [_role(recipe, i) for i in recipe.ingredients]
    for number, (role, checkpoint) in enumerate(zip_longest(roles, plan.checkpoints), 1 - (recipe.base is not None)):
        size = format_bytes(int(checkpoint.table.nbytes.sum()))
        dtypes = "+".join(sorted({checkpoint.table.dtype(t).name for t in range(len(checkpoint.table))}))
        print(f"  {number or '':>3}  {checkpoint.path}  {role or 'importance'}, {size}, {dtypes}")
    groups = "" if tiling.group == len(plan.checkpoints) else f", {tiling.group} ingredients at a time"
    sweeps = plan.method.sweeps + plan.method.whole_sweeps
    rows = [
        ("tensors", f"{len(plan.table):,} ({copied:,} copied)"),
        ("parameters", format_count(plan.parameters)),
        ("read", f"{format_bytes(plan.bytes_to_read)}, {_reading(plan)} ({_READ_WORDS[mode]})"),
        *([("sweeps", f"{sweeps} (to measure, then to combine)")] if sweeps > 1 else []),
        *naming_rows(plan.touched, plan.left_out),
        *([("sums", "kept in float32, as asked for")] if plan.accumulate == "float32" else []),
        ("write", f"{format_bytes(plan.bytes_to_write)} in {len(plan.layout.shards)} file(s)"),
        ("disk needed", f"{format_bytes(plan.bytes_to_write)}"),
        (
            "tile",
            f"{tiling.tile_elements:,} elements{groups}, {tiling.workers} thread(s) on {device}",
        ),
        *[("device", on_device(share)) for share in shares],
        ("budget", format_binary(plan.budget_bytes)),
        ("peak memory", f"{format_binary(plan.projected_peak_bytes)} projected"),
        ("plan", f"{format_binary(plan.metadata_bytes)} for names, places and digests"),
        *[("note", note) for note in plan.notes],
    ]
    for label, text in rows:
        print(f"  {label:<12} {text}")


def naming_rows(touched: Sequence[tuple[str, int]], left_out: Sequence[LeftOut]) -> list[tuple[str, str]]:
    """Say what each rule touches, and what does not get into a soup."""
    rows = [("rule", f"{rule} ({count:,} tensors)") for rule, count in touched]
    return rows + [("left out", left.in_short) for left in left_out]


def naming_json(touched: Sequence[tuple[str, int]], left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """Return the same, all of it, as plain data."""
    return {
        "rules": [{"rule": rule, "tensors": count} for rule, count in touched],
        "left_out": [left.to_json() for left in left_out],
    }


def on_device(share: DeviceShare) -> str:
    """Say what is taken of a device."""
    return (
        f"{share.device}: pieces of {share.piece_elements:,} elements, {share.slots} at a time; "
        f"{format_binary(share.peak_bytes)} of its memory projected, {format_binary(share.budget_bytes)} allowed"
    )


def _role(recipe: Recipe, ingredient: Ingredient) -> str:
    if recipe.method == "convert":
        return "source"
    if "weight" in ingredient.parameters or "weight" in recipe.parameters:
        return "weight by rule"
    return f"weight {ingredient.weight:g}" if "weight" in METHODS[recipe.method].each else "ingredient"


def _reading(plan: Plan) -> str:
    once = sum(int(c.table.nbytes.sum()) for c in plan.checkpoints)
    return "once" if plan.bytes_to_read == once else f"{plan.bytes_to_read / once:.3g} times over"


_READ_WORDS = {
    "map": "mapped files",
    "ahead": "mapped files, read ahead",
    "plain": "plain reads",
    "gds": "from storage to the device",
}


def print_result(result: SoupResult, args: argparse.Namespace) -> None:
    """Print what was made, and what it cost."""
    if args.json:
        document = {
            **dataclasses.asdict(result),
            "path": str(result.path),
            "gb_per_s": result.gb_per_s,
        }
        print(json.dumps(document))
        return
    if args.quiet:
        return
    for note in result.notes:
        print(f"note: {note}")
    checkpoints = f"{result.ingredients} checkpoint{'s' * (result.ingredients != 1)}"
    by = f" by {result.ranks} processes" if result.ranks > 1 else ""
    print(
        f"{result.path}: {checkpoints}, {format_count(result.parameters)} parameters\n"
        f"  read {format_bytes(result.bytes_read)}, wrote {format_bytes(result.bytes_written)} in "
        f"{format_seconds(result.seconds)} ({result.gb_per_s:.3g} GB/s){by}, limited by {result.limited_by}\n"
        f"  peak memory {format_binary(result.measured_peak_bytes)} "
        f"(projected {format_binary(result.projected_peak_bytes)})"
    )
    if args.read == "gds":
        print(f"  files: {_way(result.read_mode)}")


def _way(mode: str) -> str:
    """Say how files were read, of those who asked for another way."""
    if mode != "gds":
        return f"{_READ_WORDS[mode]}, since kvikio is not installed"
    from streamsoup.storage import way_in_words

    return way_in_words()
