"""A picture of a greedy run: scores after each trial beside the individual scores (needs matplotlib)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from streamsoup.errors import StreamsoupError
from streamsoup.greedy_job import GreedyResult

SUFFIXES = (".png", ".svg", ".pdf")


def require_picture(path: str | Path) -> None:
    """Check that a picture can be drawn, before hours are spent on what it is to show.

    Raises
    ------
    StreamsoupError
        If matplotlib is not installed, the format is unknown or the folder missing.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise StreamsoupError(f"{path}: a picture ends in one of {', '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise StreamsoupError(f"{path}: there is no folder {path.absolute().parent}. Make it, or choose another.")
    if importlib.util.find_spec("matplotlib") is None:
        raise StreamsoupError("Pictures need matplotlib: pip install 'streamsoup[plot]'.")


def draw_greedy(result: GreedyResult, path: str | Path, *, metric: str | None = None) -> None:
    """Draw a greedy run as PNG or SVG.

    Parameters
    ----------
    result : GreedyResult
    path : path
        Its suffix decides the format.
    metric : str, optional
        Label of the axis.

    Raises
    ------
    StreamsoupError
        If it cannot be drawn; see `require_picture`.
    """
    require_picture(path)
    from matplotlib.figure import Figure

    trials = [t for t in result.trials if t.run == 0]
    figure = Figure(figsize=(7.5, 4.0), layout="constrained")
    axes = figure.subplots()
    steps = range(len(trials))
    own = [(i, t.own_score) for i, t in enumerate(trials) if t.own_score is not None]
    axes.scatter(
        [i for i, _ in own],
        [s for _, s in own],
        s=28,
        facecolors="none",
        edgecolors="#8a8f98",
        label="ingredient alone",
    )
    colours = {True: "#1a7f5a", False: "#c2410c"}
    for accepted, marker, label in ((True, "o", "kept"), (False, "x", "rejected")):
        points = [(i, t.score) for i, t in enumerate(trials) if t.accepted is accepted]
        if points:
            axes.scatter(
                [i for i, _ in points],
                [s for _, s in points],
                s=34,
                marker=marker,
                color=colours[accepted],
                label=label,
                zorder=3,
            )
    best, score = [], trials[0].score
    for trial in trials:
        score = trial.score if trial.accepted else score
        best.append(score)
    axes.step(steps, best, where="post", color=colours[True], linewidth=1.6, label="the soup")
    axes.set_xlabel("trial")
    axes.set_ylabel(metric or "held-out score")
    axes.set_xticks(list(steps), [Path(t.path).name for t in trials], rotation=60, ha="right", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(
        f"Greedy soup: {len(result.members)} of {result.ingredients} ingredients kept, score {result.score:.4g}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
