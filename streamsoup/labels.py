"""Short names for paths."""

from __future__ import annotations

import os
from collections.abc import Sequence


def short_labels(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the last parts of paths that tell them apart."""
    parts = [[p for p in os.path.normpath(path).split(os.sep) if p] for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        found = [os.sep.join(p[-length:]) for p in parts]
        if len(set(found)) == len(set(paths)):
            return tuple(found)
    return tuple(paths)
