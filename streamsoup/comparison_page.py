"""A comparison as one self-contained page: a table and pictures as inline SVG, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from streamsoup.comparison import Comparison
from streamsoup.comparison_figures import Figures, Numbers
from streamsoup.errors import StreamsoupError
from streamsoup.units import format_bytes, format_count, format_seconds

NOT_PROVED = (
    "Distance is no ranking. The ingredient nearest to the mean, or to the base, is neither the best nor the safest; "
    "only a held-out score says which soup is good (streamsoup greedy).",
    "Norms and distances add up over all parameters, so large tensors decide them. A small tensor, such as a norm's "
    "scale, may matter more to what a network does than an embedding that is a thousand times larger.",
    "Networks that compute the same may lie far apart: neurons can be permuted, and layers scaled against one another. "
    "“Looks like another lineage” says that an ingredient is far from the others, not that it is worse, nor why.",
    "A small angle between differences does not prove that weights can be averaged without loss, and a large share of "
    "sign conflicts does not prove that they cannot.",
    "Without a base, differences are from the mean of the ingredients: their cosines are below zero on average, "
    "−1/(N−1), whatever the ingredients are like.",
    "The map is a plane: distances that need more directions than two look shorter than they are.",
)

_MOST_NUMBERED = 12
_MOST_TICKS = 14
_LOG_RATIO = 12.0


def check_page(path: str | Path) -> None:
    """Check that a page can be written, before minutes are spent on what it is to show.

    Raises
    ------
    StreamsoupError
        If it has another suffix, or the folder is missing.
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise StreamsoupError(f"{path}: a page ends in .html.")
    if not path.absolute().parent.is_dir():
        raise StreamsoupError(f"{path}: there is no folder {path.absolute().parent}. Make it, or choose another.")


def write_page(found: Comparison, path: str | Path) -> None:
    """Write a comparison as a page.

    Raises
    ------
    StreamsoupError
        See `check_page`.
    """
    check_page(path)
    Path(path).write_text(render_page(found), encoding="utf-8")


def render_page(found: Comparison) -> str:
    """Return the page."""
    kind = "the base" if found.base is not None else "the mean of the ingredients"
    layers = ""
    if len(found.layers) > 1:
        words = f"Distance of each ingredient to {kind}, as a share of its layer's norm. Point at a line for its name."
        if _is_log(_all_relative(found)):
            words += " The scale is logarithmic; smaller distances, and none, lie on its lowest line."
        if found.base is not None:
            words += " Below: the share of elements whose differences from the base have opposite signs."
        layers = _section("Layer by layer", words, draw_layers(found))
    pictures = (
        '<div class="pair">'
        + _section(
            "Cosines",
            f"Between the differences from {kind}. Blue: the same direction; orange: opposite ones.",
            draw_cosines(found),
        )
        + _section("Map", f"{_map_words(found)}", draw_map(found))
        + "</div>"
    )
    not_proved = "".join(f"<li>{escape(text)}</li>" for text in NOT_PROVED)
    title = f"{len(found.ingredients)} ingredients, {format_count(found.parameters)} parameters"
    base = f"Differences are from the base <code>{escape(found.base)}</code>." if found.base is not None else (
        "No base was given: differences are from the mean of the ingredients."
    )  # fmt: skip
    read = f"{format_bytes(found.bytes_read)} read once, in {format_seconds(found.engine_seconds)}."
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison of {title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="over">streamsoup comparison</p><h1>{title}</h1><p>{base} {read}</p></header>\n'
        f"{_facts(found)}\n{_table(found)}\n{pictures}\n{layers}\n"
        f'<section><h2>What these numbers do not prove</h2><ul class="text">{not_proved}</ul></section>\n'
        "</main>\n</body>\n</html>\n"
    )


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{body}</section>"


def _map_words(found: Comparison) -> str:
    marks = "The cross is their mean, a uniform soup"
    marks += "; the diamond is the base." if found.base is not None else "."
    odd = ", ".join(label for label, out in zip(found.labels, found.other_lineage, strict=True) if out)
    if odd:
        marks += f" Left out, since the others would shrink to a point: {odd}."
    return f"Near in the plane is near in weights; it shows {found.points_share:.0%} of the squared distances. {marks}"


def _facts(found: Comparison) -> str:
    whole, tensors = found.whole, found.tensors
    same = found.identical_parameters / found.parameters if found.parameters else 0.0
    facts = [
        (f"{whole.relative_spread:.2%}", "spread: deviation between ingredients, as a share of the weights"),
        (
            f"{int(tensors.identical.sum()):,} of {len(tensors.identical):,}",
            f"tensors identical in all ({same:.1%} of the parameters)",
        ),
    ]
    if whole.conflict_share is not None:
        facts.insert(1, (f"{whole.conflict_share:.1%}", "of the elements move in opposite directions from the base"))
    twins = sum(twin is not None for twin in found.twin_of)
    if twins:
        facts.append((f"{twins}", "copies of other ingredients" if twins > 1 else "copy of another ingredient"))
    odd = sum(found.other_lineage)
    if odd:
        facts.append((f"{odd}", "far from the others: another lineage?"))
    if whole.left_out:
        facts.append((f"{whole.left_out:,}", "tensors left out of the sums, for NaN or infinity"))
    if found.differing_buffers:
        facts.append((f"{len(found.differing_buffers):,}", "buffers (no floats) that differ"))
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in facts)
    return f'<section class="facts">{cells}</section>'


def _table(found: Comparison) -> str:
    whole, based = found.whole, found.whole.to_base
    heads = ["", "ingredient", "norm", *(["to base"] if based is not None else []), "to mean", "cosine", "NaN/Inf", ""]
    lengths = [column(v) for v in (whole.norms, based, whole.to_mean) if v is not None]
    rows = []
    for i, label in enumerate(found.labels):
        cells = [_typeset(text[i]) for text in lengths]
        cells.append(_typeset(signed(whole.mean_cosines[i], 3)))
        cells.append(f"{int(found.nonfinite[i]):,}" if found.nonfinite[i] else "–")
        inner = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        remarks = escape("; ".join(found.remarks(i)))
        name = f'<td class="name" title="{escape(found.ingredients[i])}">{escape(label)}</td>'
        rows.append(f'<tr><td class="i">{i + 1}</td>{name}{inner}<td class="remark">{remarks}</td></tr>')
    head = "".join(f"<th{'' if h in ('', 'ingredient') else ' class=n'}>{h}</th>" for h in heads)
    return (
        f'<section><h2>Ingredients</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="small">Cosine: the mean of the cosines with the others.</p></section>'
    )


def draw_cosines(found: Comparison) -> str:
    """Draw the heat map of the cosines as SVG."""
    cosines, count = found.whole.cosines, len(found.ingredients)
    side = min(56.0, 380.0 / count)
    left = 26.0
    parts = []
    for i in range(count):
        middle = left + (i + 0.5) * side
        if count <= 40:
            parts.append(_text(left - 6, middle, str(i + 1), "end muted"))
            parts.append(_text(middle, left - 9, str(i + 1), "mid muted"))
        for k in range(count):
            value = float(cosines[i, k])
            known = not math.isnan(value)
            kind = "none" if not known else "cool" if value >= 0 else "warm"
            opacity = f"{abs(value):.3f}" if known else "1"
            tip = f"{found.labels[i]} and {found.labels[k]}: {_typeset(signed(value, 3))}"
            parts.append(
                f'<rect x="{left + k * side:.2f}" y="{left + i * side:.2f}" width="{side - 1:.2f}" '
                f'height="{side - 1:.2f}" rx="2" class="{kind}" fill-opacity="{opacity}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            if count <= _MOST_NUMBERED:
                shade = "mid cell over" if known and abs(value) > 0.75 else "mid cell"
                parts.append(
                    _text(left + (k + 0.5) * side - 0.5, middle, _typeset(signed(value, 2)).lstrip("+"), shade)
                )
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


def number(value: float) -> str:
    """Write a number with four digits."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def column(values: Numbers) -> list[str]:
    """Write norms or distances with as many decimals as give the largest four digits."""
    numbers = values.tolist()
    largest = max((v for v in numbers if math.isfinite(v)), default=0.0)
    if not 1e-3 <= largest < 1e6:
        return [number(v) for v in numbers]
    decimals = max(0, 3 - math.floor(math.log10(largest)))
    return ["-" if math.isnan(v) else f"{v:.{decimals}f}" for v in numbers]


def signed(value: float, digits: int) -> str:
    """Write a cosine."""
    return "-" if math.isnan(value) else f"{round(float(value), digits) + 0.0:+.{digits}f}"


def _typeset(text: str) -> str:
    """Write a minus as a minus, and nothing as a dash."""
    return "–" if text == "-" else text.replace("-", "−")


_STYLE = """
:root{--ground:#fff;--ink:#1f2430;--muted:#667085;--rule:#e4e7ec;--cool:#2b6cb0;--warm:#c2571a;--over:#fff;
color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ground:#14171d;--ink:#e6e8ec;--muted:#98a2b3;--rule:#2b313c;
--cool:#5b9fe0;--warm:#e58a50;--over:#0d1117}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:920px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:26px;line-height:1.2;margin:0 0 8px;font-weight:650}
h2{font-size:17px;margin:0 0 2px;font-weight:650}
p{margin:0 0 12px;color:var(--muted)}
.over{text-transform:uppercase;letter-spacing:.08em;font-size:12px;margin:0 0 4px}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.92em;color:var(--ink);overflow-wrap:anywhere}
section{margin-top:36px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:20px;margin-top:24px}
.facts div{border-left:3px solid var(--cool);padding-left:12px}
.facts b{display:block;font-size:22px;font-weight:650;line-height:1.25}
.facts span{color:var(--muted);font-size:13px;line-height:1.35;display:block}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:0 40px}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin-top:8px}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:500;color:var(--muted);font-size:13px}
.n{text-align:right}
.i{color:var(--muted);width:1px}
.name{font-weight:550;max-width:280px;overflow:hidden;text-overflow:ellipsis}
.remark{color:var(--warm);padding-left:12px;white-space:normal;min-width:170px}
.small{font-size:13px;margin:8px 0 0}
.text{padding-left:20px;margin:10px 0 0;max-width:74ch}
.text li{margin-bottom:8px}
svg{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",sans-serif;
font-variant-numeric:tabular-nums}
.wide svg{min-width:640px}
text{fill:var(--ink)}
text.muted{fill:var(--muted)}
text.mid{text-anchor:middle}
text.end{text-anchor:end}
text.small{font-size:10.5px;font-weight:600}
text.over{fill:var(--over)}
text.cell,text.over{pointer-events:none}
.cool{fill:var(--cool)}
.warm{fill:var(--warm)}
.none{fill:var(--rule)}
.frame{fill:none;stroke:var(--rule)}
.rule{stroke:var(--rule)}
.thin{stroke:var(--rule);stroke-width:1.5}
.cross{stroke:var(--ink);stroke-width:2;fill:none}
.dot{fill:var(--cool);stroke:var(--ground);stroke-width:1.5}
.base{fill:var(--ground);fill-opacity:.6;stroke:var(--ink);stroke-width:2}
.line{fill:none;stroke:var(--cool);stroke-width:1.6;stroke-opacity:.55;stroke-linejoin:round}
.line.odd{stroke:var(--warm);stroke-opacity:.9}
.line:hover{stroke-opacity:1;stroke-width:3}
.bar{fill:var(--muted);fill-opacity:.45}
@media print{main{padding:0}}
"""
