"""Layers of a network, read from the names of its tensors.

A layer's number is the first whole number between dots. Layers with the same text before it are one stack:
``vision.layers.3.mlp.weight`` and ``text.layers.3.mlp.weight`` belong to two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack and the number of a tensor's layer; None if it belongs to none."""
    match = _NUMBER.search(name)
    return (name[: match.start(1)], int(match[1])) if match else None


def layer_name(name: str) -> str:
    """Name the layer of a tensor: its stack and number; or its module, where there is none."""
    layer = layer_of(name)
    return name.rpartition(".")[0] or name if layer is None else f"{layer[0]}{layer[1]}"


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Return how many layers each stack has: its highest number and one."""
    counts: dict[str, int] = {}
    for name in names:
        if (layer := layer_of(name)) is not None:
            counts[layer[0]] = max(counts.get(layer[0], 0), layer[1] + 1)
    return counts
