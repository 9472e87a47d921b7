"""Everything that can be an ingredient, behind one `Checkpoint` protocol."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from streamsoup.checkpoints.adapter_soups import adapter_notes
from streamsoup.checkpoints.adapters import add_adapter
from streamsoup.checkpoints.derived import DerivedCheckpoint, is_computed, notes_of, out_dtypes_of, prepare_derived
from streamsoup.checkpoints.held import HeldCheckpoint, held_like
from streamsoup.checkpoints.hub import find_snapshot, is_hub_id
from streamsoup.checkpoints.identity import expect_identity, identify, identity_key, identity_to_json, verify_unchanged
from streamsoup.checkpoints.live import LiveCheckpoint, is_live_name, is_state, live_name, open_live
from streamsoup.checkpoints.naming import (
    Opened,
    name_and_choose,
    name_and_choose_like,
    opening_of_some,
)
from streamsoup.checkpoints.opening import AS_THEY_ARE, Opening
from streamsoup.checkpoints.paths import absolute_path, given_paths, pinned_path, real_path, short_path, split_path
from streamsoup.checkpoints.protocol import Checkpoint, Shard, StoredCheckpoint
from streamsoup.checkpoints.quantising import quantised, scaled_names
from streamsoup.checkpoints.safetensors import Parsed
from streamsoup.checkpoints.scaled import dequantised
from streamsoup.checkpoints.selected import arranged_like, select
from streamsoup.checkpoints.shared import LeftOut, advice_on
from streamsoup.checkpoints.sliced import open_sliced, split_parts
from streamsoup.checkpoints.stored import open_stored
from streamsoup.checkpoints.table import TensorTable
from streamsoup.errors import CheckpointNotFoundError

__all__ = [
    "AS_THEY_ARE",
    "Checkpoint",
    "DerivedCheckpoint",
    "HeldCheckpoint",
    "LeftOut",
    "LiveCheckpoint",
    "Opened",
    "Opening",
    "Shard",
    "StoredCheckpoint",
    "TensorTable",
    "absolute_path",
    "adapter_notes",
    "advice_on",
    "arranged_like",
    "expand_paths",
    "expect_identity",
    "given_paths",
    "held_like",
    "identify",
    "identity_key",
    "identity_to_json",
    "is_computed",
    "is_hub_id",
    "is_live_name",
    "is_state",
    "live_name",
    "name_and_choose_like",
    "natural_order",
    "notes_of",
    "open_checkpoints",
    "open_like",
    "open_live",
    "open_together",
    "opening_of_some",
    "out_dtypes_of",
    "pinned_path",
    "prepare_derived",
    "quantised",
    "real_path",
    "scaled_names",
    "select",
    "short_path",
    "split_path",
    "verify_unchanged",
]


def open_checkpoints(paths: Sequence[str | Checkpoint], opening: Opening = AS_THEY_ARE) -> list[Checkpoint]:
    """Open ingredients in order. Equal headers are parsed once and share their tables.

    Parameters
    ----------
    paths : sequence of str or Checkpoint
        What is open already is returned as it is.

    Raises
    ------
    CheckpointError, MismatchError, RecipeError
    """
    return open_together(paths, opening).checkpoints


def open_together(paths: Sequence[str | Checkpoint], opening: Opening = AS_THEY_ARE) -> Opened:
    """Open ingredients as `open_checkpoints` does, and say what became of the names of their tensors.

    Raises
    ------
    CheckpointError, MismatchError, RecipeError
    """
    parsed = Parsed()
    opened = [_open(path, parsed, opening.key) if isinstance(path, str) else path for path in paths]
    return name_and_choose(opened, opening)


def open_like(path: str, opening: Opening, first: Checkpoint) -> Opened:
    """Open one more ingredient after those that were opened together, of which `first` is one.

    Raises
    ------
    CheckpointError, MismatchError
    """
    return name_and_choose_like(_open(path, Parsed(), opening.key), opening, first)


def _open(path: str, parsed: Parsed, key: str | None = None) -> Checkpoint:
    opened, *adapters = split_path(path)
    if adapters:
        base = _open(opened, parsed, key)
        for number, adapter in enumerate(adapters, 1):
            base = add_adapter("+".join([opened, *adapters[:number]]), base, _open(adapter, parsed))
        return base
    if is_hub_id(path):
        snapshot = find_snapshot(path)
        found: Any = _open(snapshot.place, parsed, key)
        return replace(found, path=snapshot.pinned, folder=snapshot.folder)  # type: ignore[no-any-return]
    parts = split_parts(path)
    stored = open_sliced(path, parts, parsed, key) if parts else open_stored(path, parsed, key)
    return dequantised(stored, parsed.scalings)


def expand_paths(paths: Sequence[str]) -> list[str]:
    """Expand patterns, each in natural order (run2 before run10); other paths stay as they are.

    Patterns of bases and adapters, ``base+runs/*``, are expanded each, and every base gets every adapter.

    Raises
    ------
    CheckpointNotFoundError
        If a pattern matches nothing.
    """
    expanded: list[str] = []
    for path in paths:
        parts = split_path(path, lambda part: os.path.exists(part) or bool(glob.glob(part)))
        expanded += ["+".join(found) for found in itertools.product(*(_expand(part) for part in parts))]
    return expanded


def _expand(path: str) -> list[str]:
    if not glob.has_magic(path) or os.path.exists(path) or split_parts(path):
        return [path]
    found = _natural(glob.glob(path))
    if not found:
        raise CheckpointNotFoundError(f"{path}: matches no file or folder.", path=path)
    return found


def natural_order(paths: Sequence[str]) -> list[str]:
    """Put a list that is in plain alphabetical order, as a shell leaves it, into natural order.

    Any other order is a person's own and is kept.
    """
    return _natural(paths) if list(paths) == sorted(paths) else list(paths)


def _natural(paths: Sequence[str]) -> list[str]:
    from natsort import natsorted

    return natsorted(paths)
