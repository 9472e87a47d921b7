"""A picture of a benchmark: the ceilings of the machine, and how close the engine comes (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamsoup.bench.report import BenchReport
from streamsoup.picture import require_picture

_INK, _GREY, _BLUE, _ORANGE = "#1f2430", "#c9ced6", "#2b6cb0", "#dd6b20"


def draw_bench(report: BenchReport, path: str | Path) -> None:
    """Draw ceilings as outlines and the engine as bars below them, on one logarithmic axis, as PNG, SVG or PDF.

    Raises
    ------
    StreamsoupError
        If it cannot be drawn; see `streamsoup.picture.require_picture`.
    """
    require_picture(path)
    from matplotlib.figure import Figure

    engine = report.engine
    by_name = {ceiling.name: ceiling for ceiling in report.ceilings}
    stages = [s for s in engine.stages if s.gb_per_s is not None and s.ceiling in by_name]
    covered = {stage.ceiling for stage in stages}
    rows: list[tuple[str, float, float | None, bool]] = [
        ("soup: ingredients", engine.input_bytes / engine.floor_seconds.median / 1e9, engine.gb_per_s.median, True)
    ]
    for stage in stages:
        assert stage.ceiling is not None
        limit = stage.name == engine.limited_by
        rows.append((f"{stage.name}: {stage.ceiling}", by_name[stage.ceiling].gb_per_s.median, stage.gb_per_s, limit))
    rows += [(c.name, c.gb_per_s.median, None, False) for c in report.ceilings if c.name not in covered]
    figure = Figure(figsize=(8.0, 1.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (_, ceiling, reached, limit) in enumerate(rows):
        y = len(rows) - place
        axes.barh(y, ceiling, height=0.62, color="white" if reached else "#eef1f5", edgecolor=_GREY, linewidth=1.2)
        if reached is not None:
            axes.barh(y, reached, height=0.38, color=_ORANGE if limit and place else _BLUE)
        _label(axes, y, ceiling, reached)
    axes.set_yticks([len(rows) - i for i in range(len(rows))], [row[0] for row in rows], color=_INK)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    lowest = min(min(ceiling, reached or ceiling) for _, ceiling, reached, _ in rows)
    axes.set_xlim(lowest / 2, 4 * max(max(ceiling, reached or 0) for _, ceiling, reached, _ in rows))
    axes.set_xlabel("GB/s   outline: ceiling (for the soup: the floor), bar: the engine, orange: what limits it")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", color="#eef1f5", zorder=0)
    axes.set_axisbelow(True)
    axes.set_title(
        f"{engine.what}, {engine.cache.split(':')[0]}: {engine.gb_per_s.median:.1f} GB/s  ({report.machine['cpu']}, "
        f"{report.machine['cores']} cores)",
        loc="left",
        fontsize=11,
        color=_INK,
    )
    figure.savefig(path, dpi=160)


def _label(axes: Any, y: float, ceiling: float, reached: float | None) -> None:
    text = f"{ceiling:.3g}" if reached is None else f"{reached:.3g}  ({reached / ceiling:.0%} of {ceiling:.3g})"
    axes.text(max(ceiling, reached or 0) * 1.06, y, text, va="center", fontsize=8.5, color=_INK)
