"""A picture of a learned soup: its coefficients, and the loss against the step (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamsoup.labels import short_labels
from streamsoup.learning.job import LearnResult
from streamsoup.picture import require_picture

_MOST_NAMES = 40
_GREEN, _ORANGE, _GREY = "#1a7f5a", "#c2410c", "#8a8f98"


def draw_learned(result: LearnResult, path: str | Path) -> None:
    """Draw a learned soup as PNG or SVG.

    Parameters
    ----------
    result : LearnResult
    path : path
        Its suffix decides the format.

    Raises
    ------
    StreamsoupError
        If it cannot be drawn; see `streamsoup.picture.require_picture`.
    """
    require_picture(path)
    from matplotlib.figure import Figure

    groups = len(result.groups)
    height = 3.6 + 0.18 * min(groups, _MOST_NAMES) if groups > 1 else 4.0
    figure = Figure(figsize=(11.0, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1.0))
    if groups > 1:
        _heat_map(figure, left, result)
    else:
        _bars(left, result)
    _losses(right, result)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, result: LearnResult) -> None:
    values = result.coefficients[0]
    places = range(len(values))
    axes.barh(places, values, color=_GREEN, height=0.7)
    axes.axvline(1 / len(values), color=_GREY, linewidth=1.0, linestyle=":", label="all equal")
    axes.legend(frameon=False, fontsize=8)
    axes.set_yticks(places, short_labels(result.ingredients), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("coefficient")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Learned soup of {len(values)} ingredients", fontsize=10)


def _heat_map(figure: Any, axes: Any, result: LearnResult) -> None:
    values = result.coefficients
    negative = float(values.min()) < 0
    largest = float(abs(values).max()) or 1.0
    colours = {"cmap": "PiYG", "vmin": -largest, "vmax": largest} if negative else {"cmap": "Greens", "vmin": 0.0}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **colours)
    figure.colorbar(image, ax=axes, label="coefficient", shrink=0.8)
    axes.set_xticks(range(values.shape[1]), short_labels(result.ingredients), rotation=60, ha="right", fontsize=7)
    step = -(-len(result.groups) // _MOST_NAMES)
    axes.set_yticks(range(0, len(result.groups), step), result.groups[::step], fontsize=6)
    axes.set_title(f"Coefficients of {len(result.groups)} groups of tensors", fontsize=10)


def _losses(axes: Any, result: LearnResult) -> None:
    steps = result.steps
    axes.plot(
        [s.step for s in steps], [s.loss for s in steps], color=_GREEN, linewidth=1.2, label="loss of the batches"
    )
    held = [(s.step, s.held_out) for s in steps if s.held_out is not None]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color=_ORANGE, markersize=4, linewidth=1.2, label="held-out loss")
        axes.axvline(result.best_step, color=_GREY, linewidth=1.0, linestyle=":", label="the soup")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Loss against step", fontsize=10)
