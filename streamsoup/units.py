"""Bytes and rates, read and written the way people do. GB is 10⁹ bytes, GiB is 2³⁰."""

from __future__ import annotations

import re
from fractions import Fraction

from streamsoup.errors import RecipeError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")},
    **{p: 1000 ** (i + 1) for i, p in enumerate("kmgt")},
    **{f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Read a size such as ``512MiB``, ``5GB`` or ``1048576``.

    Raises
    ------
    RecipeError
        If it is no size, or not positive.
    """
    match = _SIZE.fullmatch(str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    size_bytes = int(Fraction(match[1]) * unit) if match and unit else 0
    if size_bytes <= 0:
        raise RecipeError(f"{text!r} is not a size. Write bytes with a unit, such as 512MiB or 5GB.")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """Write a size in decimal units: ``7.41 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 999.5:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB" if size_bytes < 999.5 else f"{size_bytes:,.0f} TB"


def format_binary(size_bytes: float) -> str:
    """Write a memory size in binary units: ``256 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1023.5:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} TiB"


def format_count(count: int) -> str:
    """Write a number of parameters: ``463 M``."""
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if count >= limit:
            return f"{count / limit * (10 if unit == ' k' else 1):.3g}{unit}"
    return f"{count:,}"


def format_seconds(seconds: float) -> str:
    """Write a duration: ``0.84 s``, ``1 min 12 s``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
