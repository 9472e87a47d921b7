"""``streamsoup inspect --compare``: what the ingredients are like, as a table, JSON or a page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from streamsoup.cli.options import add_running_options, naming_of
from streamsoup.cli.tables import table
from streamsoup.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from streamsoup.comparison import Comparison
    from streamsoup.comparison_figures import Figures
    from streamsoup.outcome import Progress

_MOST_COLUMNS = 12
_MOST_LAYERS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a comparison."""
    group = parser.add_argument_group("comparing their numbers (each byte is read once)")
    group.add_argument("--compare", action="store_true", help="compare their numbers, and not their headers alone")
    group.add_argument(
        "--base",
        metavar="CHECKPOINT",
        help="what they were fine-tuned from: differences are from it (default: from their mean)",
    )
    group.add_argument("--html", metavar="FILE", help="write a page with pictures, which needs nothing but itself")
    add_running_options(group)


def refuse_options(args: argparse.Namespace) -> None:
    """Refuse what means nothing without ``--compare``."""
    from streamsoup.cli.guard import UsageError

    for name in ("base", "html", "budget", "device", "device-budget", "threads", "read"):
        if getattr(args, name.replace("-", "_")) is not None:
            raise UsageError(f"--{name} belongs to --compare. Give both, or neither.")


def run(args: argparse.Namespace) -> int:
    """Compare, and show what was found."""
    from streamsoup.checkpoints import expand_paths, natural_order
    from streamsoup.cli.progress import make_progress

    # numba looks for scipy, whose import takes as long as numba's own. This process is ours, and needs none.
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    from streamsoup.comparison import compare
    from streamsoup.comparison_page import check_page, write_page

    if args.html:
        check_page(args.html)
    with make_progress(quiet=args.quiet or args.json) as progress:

        def step(now: Progress) -> None:
            progress(dataclasses.replace(now, stage="comparing"))

        found = compare(
            natural_order(expand_paths(args.checkpoints)),
            args.base,
            **{name: value for name, value in naming_of(args).items() if value is not None},
            budget_bytes=args.budget,
            device=args.device or "cpu",
            device_budget_bytes=args.device_budget,
            workers=args.threads,
            read_mode=args.read or "auto",
            progress=step,
            on_compile=progress.compiling,
        )
    if args.html:
        write_page(found, args.html)
    if args.json:
        print(json.dumps(found.to_json(tensors=args.tensors), allow_nan=False))
        return 0
    width = shutil.get_terminal_size().columns
    print("\n".join(_report(found, width, tensors=args.tensors)))
    if args.html:
        print(f"\nThe page is {Path(args.html)}.")
    return 0


def _report(found: Comparison, width: int, *, tensors: bool) -> list[str]:
    lines = _ingredients(found, width)
    if len(found.ingredients) <= _MOST_COLUMNS:
        lines += ["", *_cosines(found, width)]
    lines += ["", *_totals(found), "", *_layers(found, width)]
    return lines + (["", *_tensors(found, width)] if tensors else [])


def _ingredients(found: Comparison, width: int) -> list[str]:
    from streamsoup.comparison_figures import column, signed

    whole, based = found.whole, found.base is not None
    heads = ["", "norm", *(["to base"] if based else []), "to mean", "cosine", "NaN/Inf", ""]
    lengths = [column(v) for v in (whole.norms, whole.to_base, whole.to_mean) if v is not None]
    rows = [
        [
            label,
            *(texts[i] for texts in lengths),
            signed(whole.mean_cosines[i], 3),
            f"{int(found.nonfinite[i]):,}" if found.nonfinite[i] else "-",
            "; ".join(found.remarks(i)),
        ]
        for i, label in enumerate(found.labels)
    ]
    start = f"the base {found.base}" if based else "the mean of them"
    return [
        f"{len(found.ingredients)} ingredients, {format_count(found.parameters)} parameters. "
        f"Differences are from {start}.",
        "",
        *table(heads, rows, width),
    ]


def _cosines(found: Comparison, width: int) -> list[str]:
    from streamsoup.comparison_figures import signed

    labels = found.labels
    cosines = found.whole.cosines
    heads = ["", *(str(i + 1) for i in range(len(labels)))]
    rows = [[f"{label} ({i + 1})", *(signed(c, 2) for c in cosines[i])] for i, label in enumerate(labels)]
    return ["Cosines between the differences:", *table(heads, rows, width)]


def _totals(found: Comparison) -> list[str]:
    from streamsoup.comparison_figures import number

    whole, identical = found.whole, found.tensors.identical
    share = found.identical_parameters / found.parameters if found.parameters else 0.0
    rows = [
        ("identical tensors", f"{int(identical.sum()):,} of {len(identical):,} ({share:.2%} of the parameters)"),
        (
            "spread",
            f"{number(math.sqrt(whole.variance))} between ingredients, {whole.relative_spread:.3%} of the weights",
        ),
    ]
    if whole.conflict_share is not None:
        of_moved = whole.conflicts / whole.moved if whole.moved else 0.0
        rows.append(
            ("sign conflict", f"{whole.conflict_share:.2%} of the elements ({of_moved:.2%} of those that moved)")
        )
    if whole.left_out:
        rows.append(("left out", f"{whole.left_out:,} tensor(s) with NaN, infinity or numbers too large to square"))
    rows += [("left out", left.in_short) for left in found.left_out]
    if found.base_nonfinite:
        rows.append(("base", f"{found.base_nonfinite:,} NaN or infinite elements"))
    if found.differing_buffers:
        names = ", ".join(found.differing_buffers[:3]) + (" ..." if len(found.differing_buffers) > 3 else "")
        rows.append(("buffers that differ", f"{len(found.differing_buffers):,} ({names})"))
    rate = f"{format_bytes(found.bytes_read)} in {format_seconds(found.engine_seconds)}, {found.gb_per_s:.2f} GB/s"
    rows.append(("read", f"{rate} ({found.read_mode}, {found.device})"))
    side = max(len(name) for name, _ in rows)
    return [f"{name:<{side}}  {text}" for name, text in rows]


def _layers(found: Comparison, width: int) -> list[str]:
    most = sorted(found.layers.items(), key=lambda item: -item[1].relative_spread)[:_MOST_LAYERS]
    rows = [[name, *_spread(layer)] for name, layer in most]
    return ["Layers that differ most:", *table(_spread_heads(found), rows, width)]


def _spread_heads(found: Comparison) -> list[str]:
    return ["", "spread", "cosine", *(["sign conflict"] if found.base is not None else []), "parameters"]


def _spread(figures: Figures) -> list[str]:
    from streamsoup.comparison_figures import signed

    cosines = [c for c in figures.mean_cosines.tolist() if not math.isnan(c)]
    conflict = [] if figures.conflict_share is None else [f"{figures.conflict_share:.2%}"]
    mean = sum(cosines) / len(cosines) if cosines else math.nan
    return [f"{figures.relative_spread:.3%}", signed(mean, 3), *conflict, format_count(figures.elements)]


def _tensors(found: Comparison, width: int) -> list[str]:
    from streamsoup.comparison_figures import signed

    tensors = found.tensors
    rows = []
    for t, name in enumerate(tensors.names):
        elements = int(tensors.elements[t])
        size = math.sqrt(float((tensors.norms[t] ** 2).sum()))
        spread = math.sqrt(float((tensors.to_mean[t] ** 2).sum())) / size if size > 0 else 0.0
        conflict = [f"{int(tensors.conflicts[t]) / elements if elements else 0:.2%}"] if found.base is not None else []
        same = "identical" if tensors.identical[t] else ""
        rows.append([name, share(spread), signed(tensors.cosines[t], 3), *conflict, format_count(elements), same])
    return ["All tensors:", *table([*_spread_heads(found), ""], rows, width)]


def share(value: float) -> str:
    """Write a share."""
    return "-" if math.isnan(value) else f"{value:.3%}"


__all__ = ["add_options", "refuse_options", "run"]
