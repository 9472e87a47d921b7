"""A comparison as one self-contained page: a table and pictures as inline SVG, for light and dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from streamsoup.comparison import Comparison
from streamsoup.comparison_figures import column, signed, typeset
from streamsoup.comparison_pictures import draw_cosines, draw_layers, draw_map, is_logarithmic
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
        if is_logarithmic(found):
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
        cells = [typeset(text[i]) for text in lengths]
        cells.append(typeset(signed(whole.mean_cosines[i], 3)))
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
