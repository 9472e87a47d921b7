"""Checkpoints put together of layers of others, without copying any: ``/runs/a[0:16]+/runs/b[8:24]``.

Layers are numbered anew in this order. What belongs to no layer is the first part's if it comes before the layers, and
the last part's if it comes after them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamsoup.checkpoints.protocol import Checkpoint, Shard, StoredCheckpoint
from streamsoup.checkpoints.safetensors import Parsed
from streamsoup.checkpoints.stored import open_stored
from streamsoup.checkpoints.table import pack
from streamsoup.errors import CheckpointError, MismatchError
from streamsoup.layers import layer_of, stacks_of

_PART = re.compile(r"(.+)\[(\d+):(\d+)\]")
_AFTER = re.compile(
    r"(?:^|\.)(?:norm|norm_f|ln_f|final_layer_?norm|output|output_layer|lm_head|embed_out|score|(?:pre_)?classifier"
    r"|pooler|cls|vocab_\w+)\."
)
_BEFORE = re.compile(r"embed|embd|(?:^|\.)(?:wte|wpe|relative_pe|rotary_\w+)\.")


@dataclass(frozen=True, slots=True)
class Part:
    """Layers `start` to `stop` - 1 of a checkpoint."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Row:
    """Where a tensor comes from: the part's number, its name there, and its layer there (None: in no layer)."""

    name: str
    part: int
    source: str
    layer: int | None = None


@dataclass(frozen=True)
class SlicedCheckpoint(StoredCheckpoint):
    """A `Checkpoint` whose tensors lie in the shards of others.

    Attributes
    ----------
    layers : tuple of int
        For each layer, its number where it comes from.
    layers_before : int
        How many layers the first part's checkpoint has.
    """

    layers: tuple[int, ...]
    layers_before: int


def join_parts(parts: Sequence[Part]) -> str:
    """Write parts as the path of one checkpoint; it means the same from any folder."""
    return "+".join(f"{os.path.realpath(p.path)}[{p.start}:{p.stop}]" for p in parts)


def split_parts(path: str) -> tuple[Part, ...]:
    """Read such a path; nothing where it is a plain one.

    Raises
    ------
    CheckpointError
        If it would not mean the same from another folder.
    """
    if not path.endswith("]") or os.path.exists(path):
        return ()
    found = [_PART.fullmatch(part) for part in re.split(r"(?<=\])\+", path)]
    parts = tuple(Part(m[1], int(m[2]), int(m[3])) for m in found if m) if all(found) else ()
    for part in parts[1:]:
        if not os.path.isabs(part.path):
            raise CheckpointError(
                f"{path}: {part.path} is not an absolute path, so it would mean another checkpoint in another folder. "
                "Write all paths from the root.",
                path=path,
            )
    return parts


def open_sliced(
    path: str, parts: Sequence[Part], parsed: Parsed | None = None, key: str | None = None
) -> SlicedCheckpoint:
    """Open the checkpoints that the parts are of, and pick their tensors; none is read.

    `key` is where the model is in files of PyTorch.

    Raises
    ------
    CheckpointError, MismatchError
        If there are no such layers, they are not alike, or their tensors do not lie in one piece each.
    """
    sources = {part.path: _in_place(part.path, parsed, key) for part in parts}
    rows = _rows(parts, sources)
    first_shard: dict[str, int] = {}
    shards: list[Shard] = []
    for name, source in sources.items():
        first_shard[name] = len(shards)
        shards += source.shards
    positions = {name: source.table.positions() for name, source in sources.items()}
    places = [(parts[row.part].path, positions[parts[row.part].path][row.source]) for row in rows]
    tables = [(sources[name].table, position) for name, position in places]
    table = pack(
        [row.name for row in rows],
        [t.dtype(i) for t, i in tables],
        [t.shape(i) for t, i in tables],
        [int(t.begins[i]) for t, i in tables],
        [first_shard[name] + int(sources[name].table.shards[i]) for name, i in places],
    )
    first = sources[parts[0].path]
    layers = tuple(layer for part in parts for layer in range(part.start, part.stop))
    before = layer_stack(first)[1]
    return SlicedCheckpoint(path, first.folder, tuple(shards), table, first.metadata, layers, before)


def _in_place(path: str, parsed: Parsed | None, key: str | None) -> StoredCheckpoint:
    found = open_stored(path, parsed, key)
    if isinstance(found, StoredCheckpoint):
        return found
    raise CheckpointError(
        f"{path}: has tensors that are transposed, or in pieces of several processes, so layers cannot be picked out "
        "of it in place. Write it as safetensors with streamsoup convert, and pick them there.",
        path=path,
    )


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """Say of each tensor where it comes from."""
    parsed = Parsed()
    return _rows(parts, {part.path: open_stored(part.path, parsed) for part in parts})


def layer_stack(checkpoint: Checkpoint) -> tuple[str, int]:
    """Return what stands before the layers' numbers, and how many layers there are.

    Raises
    ------
    CheckpointError
        If there is no stack of layers, or more than one.
    """
    stacks = stacks_of(checkpoint.table.names)
    if len(stacks) != 1:
        several = f"has {len(stacks)} stacks of layers ({', '.join(sorted(stacks))})"
        found = several if stacks else "has no numbered layers"
        raise CheckpointError(
            f"{checkpoint.path}: {found}, but layers can only be picked out of one stack. Merge it whole.",
            path=checkpoint.path,
        )
    (stack,) = stacks.items()
    return stack


def _rows(parts: Sequence[Part], sources: Mapping[str, Checkpoint]) -> list[Row]:
    stacks = {path: layer_stack(source) for path, source in sources.items()}
    loose: dict[str, list[str]] = {path: [] for path in sources}
    inner: dict[str, dict[int, list[str]]] = {path: {} for path in sources}
    for path, source in sources.items():
        for name in source.table.names:
            found = layer_of(name)
            if found is None:
                loose[path].append(name)
            else:
                inner[path].setdefault(found[1], []).append(name)
    stack = stacks[parts[0].path][0]
    first, last = parts[0].path, parts[-1].path
    alike = first == last
    rows = [Row(name, 0, name) for name in loose[first] if not _is_after(name, sources[first], alike=alike)]
    position = 0
    for number, part in enumerate(parts):
        own, count = stacks[part.path]
        if not 0 <= part.start < part.stop <= count or own != stack:
            raise CheckpointError(
                f"{part.path}: layers {part.start} to {part.stop} of {stack}* were asked for, but it has {own}0 to "
                f"{own}{count - 1}. Correct the range.",
                path=part.path,
            )
        for layer in range(part.start, part.stop):
            rows += [
                Row(f"{stack}{position}{name[len(f'{stack}{layer}') :]}", number, name, layer)
                for name in inner[part.path].get(layer, ())
            ]
            position += 1
    end = len(parts) - 1
    rows += [Row(name, end, name) for name in loose[last] if _is_after(name, sources[last], alike=alike)]
    _refuse_unlike(rows, parts, sources, stack)
    return rows


def _is_after(name: str, checkpoint: Checkpoint, *, alike: bool) -> bool:
    """Whether a tensor comes after the layers; if both ends are `alike`, it need not be known."""
    if _AFTER.search(name):
        return True
    if alike or _BEFORE.search(name):
        return False
    raise CheckpointError(
        f"{name}: in {checkpoint.path}, belongs to no layer, and its name does not tell whether it comes before or "
        "after them. Take the first and the last slice from the same model.",
        path=checkpoint.path,
    )


def _refuse_unlike(rows: Sequence[Row], parts: Sequence[Part], sources: Mapping[str, Checkpoint], stack: str) -> None:
    """Refuse layers that have other tensors or shapes than the first."""
    positions = {path: source.table.positions() for path, source in sources.items()}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    origin: dict[str, str] = {}
    for row in rows:
        if row.layer is None:
            continue
        number, _, rest = row.name[len(stack) :].partition(".")
        path = parts[row.part].path
        layers.setdefault(number, {})[rest] = sources[path].table.shape(positions[path][row.source])
        origin[number] = f"layer {row.layer} of {path}"
    first = next(iter(layers))
    for number, shapes in layers.items():
        for name in sorted(shapes.keys() | layers[first].keys()):
            a, b = layers[first].get(name), shapes.get(name)
            if a != b:
                raise MismatchError(
                    [
                        f"{name}: shape {b or 'none'} in {origin[number]}, but {a or 'none'} in {origin[first]}. Take "
                        "layers of models that are alike."
                    ]
                )


def scales_of(parts: Sequence[Part], scale: Callable[[int, str, float], float]) -> list[dict[str, Any]]:
    """Make conditions of a scale for each tensor, from a function of part, name in it, and depth in the part."""
    found = []
    for row in rows_of(parts):
        part = parts[row.part]
        count = part.stop - part.start
        depth = 0.0 if row.layer is None else (row.layer - part.start) / (count - 1) if count > 1 else 1.0
        if (value := scale(row.part, row.source, depth)) != 1.0:
            found.append({"pattern": re.sub(r"([*?[])", r"[\1]", row.name), "value": value})
    return found
