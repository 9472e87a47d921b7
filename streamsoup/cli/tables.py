"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence

_LEAST_NAME, _MOST_NAME = 8, 20


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Align columns: the first to the left and, where the line is too long, shortened in its middle.

    A last column without a head is text; it goes to a line of its own where it does not fit.
    """
    from streamsoup.cli.guard import printable

    lines = [list(heads), *([printable(cell) for cell in row] for row in rows)]
    remarks = [""] * len(lines)
    if len(heads) > 1 and not heads[-1]:
        remarks = [line.pop() for line in lines]
    columns = [max(len(line[c]) for line in lines) for c in range(1, len(lines[0]))]
    longest = max(len(line[0]) for line in lines)
    gap = 2 if sum(columns) + 2 * len(columns) + min(longest, _MOST_NAME) + 2 <= width else 1
    side = min(longest, max(_LEAST_NAME, width - sum(columns) - gap * (len(columns) + 1)))
    found = []
    for line, remark in zip(lines, remarks, strict=True):
        cells = [f"{shortened(line[0], side):<{side}}", *(f"{c:>{w}}" for c, w in zip(line[1:], columns, strict=True))]
        text = " " * gap + (" " * gap).join(cells)
        fits = not remark or len(text) + 2 + len(remark) <= width
        found.append(f"{text}  {remark}".rstrip() if fits else text.rstrip())
        if not fits:
            found.append(f"    {remark}")
    return found


def shortened(text: str, width: int) -> str:
    """Leave out the middle of a text that is too long."""
    if len(text) <= width:
        return text
    tail = (width - 2) * 2 // 3
    return f"{text[: width - 2 - tail]}..{text[len(text) - tail :]}"
