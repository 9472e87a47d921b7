"""The pictures of a comparison, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from streamsoup.comparison import Comparison
from streamsoup.comparison_figures import Figures, Numbers, signed, typeset

_MOST_NUMBERED = 12
_MOST_MARKS = 20
_MOST_TICKS = 14
_LOG_RATIO = 12.0


def draw_cosines(found: Comparison) -> str:
    """Draw the heat map of the cosines as SVG."""
    cosines, count = found.whole.cosines, len(found.ingredients)
    side = min(56.0, 380.0 / count)
    left, every = 26.0, math.ceil(count / _MOST_MARKS)
    parts = []
    for i in range(count):
        middle = left + (i + 0.5) * side
        if i % every == 0:
            parts.append(_text(left - 6, middle, str(i + 1), "end muted"))
            parts.append(_text(middle, left - 9, str(i + 1), "mid muted"))
        for k in range(count):
            value = float(cosines[i, k])
            known = not math.isnan(value)
            kind = "none" if not known else "cool" if value >= 0 else "warm"
            opacity = f"{abs(value):.3f}" if known else "1"
            tip = f"{found.labels[i]} and {found.labels[k]}: {typeset(signed(value, 3))}"
            parts.append(
                f'<rect x="{left + k * side:.2f}" y="{left + i * side:.2f}" width="{side - 1:.2f}" '
                f'height="{side - 1:.2f}" rx="2" class="{kind}" fill-opacity="{opacity}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            if count <= _MOST_NUMBERED:
                shade = "mid cell over" if known and abs(value) > 0.75 else "mid cell"
                parts.append(_text(left + (k + 0.5) * side - 0.5, middle, typeset(signed(value, 2)).lstrip("+"), shade))
    size = left + count * side + 2
    return _svg(size, size, parts, "Heat map of the cosines between ingredients")


def draw_map(found: Comparison) -> str:
    """Draw the ingredients in a plane as SVG."""
    size, margin = 406.0, 34.0
    points, count = found.points, len(found.ingredients)
    shown = [i for i in range(count) if not math.isnan(points[i, 0])]
    everything = np.vstack([points[~np.isnan(points[:, 0])], np.zeros((1, 2))])
    low, high = everything.min(axis=0), everything.max(axis=0)
    span = float((high - low).max()) or 1.0
    middle = (low + high) / 2

    def place(point: Numbers) -> tuple[float, float]:
        x, y = ((point - middle) / span * (size - 2 * margin)).tolist()
        return size / 2 + x, size / 2 - y

    zero_x, zero_y = place(np.zeros(2))
    parts = [f'<rect x="1" y="1" width="{size - 2}" height="{size - 2}" rx="6" class="frame"/>']
    parts += [
        f'<line x1="{zero_x:.1f}" y1="{zero_y:.1f}" x2="{x:.1f}" y2="{y:.1f}" class="thin"/>'
        for x, y in map(place, points[shown])
    ]
    parts.append(
        f'<path d="M{zero_x - 6:.1f} {zero_y:.1f}h12M{zero_x:.1f} {zero_y - 6:.1f}v12" class="cross">'
        "<title>mean of the ingredients</title></path>"
    )
    radius = 9.0 if count <= 24 else 5.0
    for i in shown:
        x, y = place(points[i])
        tip = f"<title>{escape(found.labels[i])}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="dot">{tip}</circle>')
        if radius > 5:
            parts.append(_text(x, y + 0.5, str(i + 1), "mid over small"))
    if len(points) > count:
        x, y = place(points[count])
        tip = f"<title>the base {escape(found.base or '')}</title>"
        parts.append(f'<path d="M{x:.1f} {y - 8:.1f}l8 8l-8 8l-8 -8z" class="base">{tip}</path>')
    return _svg(size, size, parts, "Map of the ingredients")


def draw_layers(found: Comparison) -> str:
    """Draw distances, and sign conflicts if there is a base, layer by layer as SVG."""
    names, layers = list(found.layers), list(found.layers.values())
    values = _all_relative(found)
    left, width, top, height = 58.0, 800.0, 12.0, 230.0
    right = left + width
    step = width / len(names)
    finite = values[np.isfinite(values) & (values > 0)]
    highest = float(finite.max()) if finite.size else 1.0
    lowest = float(finite.min()) if finite.size else 0.0
    log = _is_log(values)
    ticks = _log_ticks(lowest, highest) if log else _ticks(highest)
    bottom, ceiling = ticks[0], ticks[-1]

    def y_of(value: float) -> float:
        share = math.log(max(value, bottom) / bottom) / math.log(ceiling / bottom) if log else value / ceiling
        return top + height * (1 - min(share, 1.0))

    parts = _grid(left, right, ticks, y_of)
    for i, label in enumerate(found.labels):
        kind = "line odd" if found.other_lineage[i] else "line"
        coordinates = [
            f"{left + (n + 0.5) * step:.1f},{y_of(float(v)):.1f}"
            for n, v in enumerate(values[:, i])
            if math.isfinite(v)
        ]
        parts.append(
            f'<polyline points="{" ".join(coordinates)}" class="{kind}"><title>{escape(label)}</title></polyline>'
        )
    base = top + height
    if found.base is not None:
        base = _draw_conflicts(parts, layers, names, left=left, step=step, top=base + 18)
    every = max(1, math.ceil(len(names) / _MOST_TICKS))
    short = _short_names(names)
    for n in range(0, len(names), every):
        x = left + (n + 0.5) * step
        parts.append(
            f'<text transform="translate({x:.1f},{base + 14:.1f}) rotate(-35)" class="end muted">'
            f"<title>{escape(names[n])}</title>{escape(short[n])}</text>"
        )
    return f'<div class="wide">{_svg(right + 8, base + 72, parts, "Distances layer by layer")}</div>'


def _draw_conflicts(
    parts: list[str], layers: Sequence[Figures], names: Sequence[str], *, left: float, step: float, top: float
) -> float:
    """Draw bars of the share of sign conflicts; returns where they end."""
    height = 60.0
    shares = [layer.conflict_share or 0.0 for layer in layers]
    ticks = _ticks(max([*shares, 0.01]), most=2)

    def y_of(value: float) -> float:
        return top + height * (1 - value / ticks[-1])

    parts += _grid(left, left + step * len(layers), ticks, y_of)
    for n, (name, share) in enumerate(zip(names, shares, strict=True)):
        width = max(1.0, step - 2)
        x = left + (n + 0.5) * step - width / 2
        parts.append(
            f'<rect x="{x:.1f}" y="{y_of(share):.1f}" width="{width:.1f}" height="{top + height - y_of(share):.1f}" '
            f'class="bar"><title>{escape(f"{name}: {share:.1%}")}</title></rect>'
        )
    return top + height


def is_logarithmic(found: Comparison) -> bool:
    """Whether `draw_layers` takes a logarithmic scale."""
    return _is_log(_all_relative(found))


def _all_relative(found: Comparison) -> Numbers:
    """Distances over norms, shape (layers, ingredients)."""
    return np.array([_relative(layer) for layer in found.layers.values()])


def _is_log(values: Numbers) -> bool:
    """Whether a few distances would press all others against the axis."""
    finite = values[np.isfinite(values) & (values > 0)]
    return finite.size > 0 and float(finite.max()) > _LOG_RATIO * float(np.median(finite))


def _relative(layer: Figures) -> Numbers:
    """Distances over norms; NaN where there are no weights."""
    distances = layer.to_mean if layer.to_base is None else layer.to_base
    norms = layer.norms
    return np.where(norms > 0, distances / np.where(norms > 0, norms, 1.0), np.nan)


def _grid(left: float, right: float, ticks: Sequence[float], y_of: Callable[[float], float]) -> list[str]:
    parts = []
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(_text(left - 8, y, f"{100 * tick:,.6g} %", "end muted"))
    return parts


def _ticks(highest: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to beyond the highest."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / most))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if highest / (s * power) <= most)
    return [step * n for n in range(math.ceil(highest / step - 1e-9) + 1)]


def _log_ticks(lowest: float, highest: float) -> list[float]:
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    return [10.0**n for n in range(max(first, last - 5), max(last, first + 1) + 1)]


def _short_names(names: Sequence[str]) -> list[str]:
    """Leave the first parts out that all have in common with another layer of their stack."""
    found = []
    for name in names:
        parts = name.split(".")
        short = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
        found.append(short if len(short) <= 16 else f"{short[:7]}…{short[-8:]}")
    return found


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'style="max-width:{width:.0f}px" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" dy="0.34em" class="{kind}">{escape(text)}</text>'
