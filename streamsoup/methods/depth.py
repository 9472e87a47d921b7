"""How deep in a network a tensor lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from streamsoup.layers import layer_of, stacks_of


def depths(names: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return for each tensor 0 for the first layer to 1 for the last of its stack; 0 for what belongs to no layer."""
    stacks = stacks_of(names)
    depth = np.zeros(len(names))
    for position, name in enumerate(names):
        if (layer := layer_of(name)) is not None and (last := stacks[layer[0]] - 1):
            depth[position] = layer[1] / last
    return depth
