"""Where in a network a tensor lies, read from its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def depths(names: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return for each tensor 0 for the first layer to 1 for the last; 0 for what belongs to no layer.

    A layer's number is the first whole number between dots; layers with the same text before it are one stack, as in
    ``vision.layers.3.mlp.weight`` and ``text.layers.3.mlp.weight`` are two.
    """
    found = [_LAYER.search(name) for name in names]
    last: dict[str, int] = {}
    for name, match in zip(names, found, strict=True):
        if match:
            stack = name[: match.start(1)]
            last[stack] = max(last.get(stack, 0), int(match[1]))
    depth = np.zeros(len(names))
    for position, (name, match) in enumerate(zip(names, found, strict=True)):
        if match and (highest := last[name[: match.start(1)]]):
            depth[position] = int(match[1]) / highest
    return depth
