"""Everything that can be an ingredient, behind one `Checkpoint` protocol."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from streamsoup.checkpoints.derived import DerivedCheckpoint, out_dtypes_of
from streamsoup.checkpoints.held import HeldCheckpoint, held_like
from streamsoup.checkpoints.identity import expect_identity, identify, identity_key, identity_to_json, verify_unchanged
from streamsoup.checkpoints.protocol import Checkpoint, Shard, StoredCheckpoint
from streamsoup.checkpoints.safetensors import Parsed, open_safetensors
from streamsoup.checkpoints.selected import arranged_like, select
from streamsoup.checkpoints.sliced import open_sliced, split_parts
from streamsoup.checkpoints.table import TensorTable
from streamsoup.errors import CheckpointNotFoundError

__all__ = [
    "Checkpoint",
    "DerivedCheckpoint",
    "HeldCheckpoint",
    "Shard",
    "StoredCheckpoint",
    "TensorTable",
    "arranged_like",
    "expand_paths",
    "expect_identity",
    "held_like",
    "identify",
    "identity_key",
    "identity_to_json",
    "natural_order",
    "open_checkpoints",
    "out_dtypes_of",
    "select",
    "verify_unchanged",
]


def open_checkpoints(paths: Sequence[str]) -> list[Checkpoint]:
    """Open ingredients in order. Equal headers are parsed once and share their tables.

    Raises
    ------
    CheckpointError
    """
    parsed = Parsed()
    return [_open(path, parsed) for path in paths]


def _open(path: str, parsed: Parsed) -> Checkpoint:
    parts = split_parts(path)
    return open_sliced(path, parts, parsed) if parts else open_safetensors(path, parsed)


def expand_paths(paths: Sequence[str]) -> list[str]:
    """Expand patterns, each in natural order (run2 before run10); other paths stay as they are.

    Raises
    ------
    CheckpointNotFoundError
        If a pattern matches nothing.
    """
    expanded: list[str] = []
    for path in paths:
        if glob.has_magic(path) and not os.path.exists(path) and not split_parts(path):
            found = _natural(glob.glob(path))
            if not found:
                raise CheckpointNotFoundError(f"{path}: matches no file or folder.", path=path)
            expanded += found
        else:
            expanded.append(path)
    return expanded


def natural_order(paths: Sequence[str]) -> list[str]:
    """Put a list that is in plain alphabetical order, as a shell leaves it, into natural order.

    Any other order is a person's own and is kept.
    """
    return _natural(paths) if list(paths) == sorted(paths) else list(paths)


def _natural(paths: Sequence[str]) -> list[str]:
    from natsort import natsorted

    return natsorted(paths)
