"""Which tensors are the scales of which 8-bit weights, read from names, dtypes and shapes; the rest is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from streamsoup.checkpoints.beside import read_config
from streamsoup.checkpoints.grids import DEFAULT_BLOCK, Block, grid_of
from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.errors import CheckpointError, UnsupportedDTypeError

SCALE_SUFFIXES = ("_scale_inv", "_scale")
# Scales of activations and of the cache of keys and values: they change no weight.
_ACTIVATION = re.compile(r"(?:^|[._])(?:input|output|activation|q|k|v|kv|attn|softmax|prob)_scale$")
_ANY_SCALE = re.compile(r"(?:_scale_inv|_scales?|\.scales?|\.scale_weight|_scale_2|_global_scale)$")
_SURELY_SCALE = re.compile(r"(?:_scale_inv|weight_scale|\.scale_weight|_scale_2|_global_scale)$")
_OFFSET = re.compile(r"(?:_zero_point|_g_idx)$")
_PACKED = re.compile(r"(.*?)(?:weight|weight_packed|qweight)$")
_OF_PACKED = ("weight_scale", "scales", "SCB", "weight.absmax", "weight_scale_inv")
_INTEGERS = ("I8", "U8", "I32")
_SCALE_DTYPES = ("F32", "BF16", "F16")
_ADVICE = "Dequantise it to bfloat16 first."


class ScaleFinder:
    """Finds the scales of one checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
    block : (int, int)
        Rows and columns of a block.
    """

    def __init__(self, checkpoint: Checkpoint, block: Block) -> None:
        self._table = checkpoint.table
        self._checkpoint = checkpoint
        self._block = block
        self._dtypes = [self._table.dtype(i) for i in range(len(self._table))]
        self._positions: Mapping[str, int] = self._table.positions()

    def pairs(self) -> dict[int, int]:
        """Return positions of weights, and of their scales.

        Raises
        ------
        UnsupportedDTypeError
            If there are numbers that must not be averaged as they are, and are not understood either.
        """
        self._refuse_exponents()
        self._refuse_integers()
        pairs = dict(self._pairs())
        if any(dtype.is_fp8 for dtype in self._dtypes):
            self._refuse_rest(pairs)
        return pairs

    def unused(self, pairs: Mapping[int, int]) -> list[int]:
        """Return positions of scales that change no weight, where weights have scales."""
        names = self._table.names
        used = {*pairs, *pairs.values()}  # the scale of a weight attn.q is attn.q_scale
        return [i for i, name in enumerate(names) if _ACTIVATION.search(name) and i not in used] if pairs else []

    def _pairs(self) -> Iterator[tuple[int, int]]:
        names = self._table.names
        for weight, dtype in enumerate(self._dtypes):
            if not dtype.is_fp8:
                continue
            found = [s for s in SCALE_SUFFIXES if names[weight] + s in self._positions]
            if len(found) > 1:
                self._fail(weight, f"has two scales, {names[weight]}{found[0]} and {names[weight]}{found[1]}")
            for suffix in found:
                scale = self._positions[names[weight] + suffix]
                self._check(weight, scale, may_repeat=suffix == "_scale")
                yield weight, scale

    def _check(self, weight: int, scale: int, *, may_repeat: bool) -> None:
        dtype = self._dtypes[scale].name
        if dtype not in _SCALE_DTYPES:
            self._fail(scale, f"has scales of dtype {dtype}, but only {', '.join(_SCALE_DTYPES)} are known")
        shape, scale_shape = self._table.shape(weight), self._table.shape(scale)
        if grid_of(shape, scale_shape, self._block, may_repeat=may_repeat) is None:
            blocks = tuple(-(-n // b) for n, b in zip(shape[-2:], self._block, strict=False))
            self._fail(
                scale,
                f"has shape {scale_shape}, but a weight of shape {shape} has scales of shape "
                f"{(*shape[:-2], *blocks) if len(shape) in (2, 3) else (1,)} in blocks of {_times(self._block)}",
                advice="Export it again, or correct weight_block_size in its config.json.",
            )

    def _refuse_rest(self, pairs: Mapping[int, int]) -> None:
        used = set(pairs) | set(pairs.values())
        for i, name in enumerate(self._table.names):
            if i in used:
                continue
            if _OFFSET.search(name):
                self._fail(i, "belongs to a quantisation that has more than scales, which is not understood")
            if _ANY_SCALE.search(name):
                self._refuse_scale(i, name, has_pairs=bool(pairs))
        for i, dtype in enumerate(self._dtypes) if pairs else ():
            if dtype.is_fp8 and i not in used:
                self._fail(i, f"is {dtype.name} without a scale, but other weights have scales")

    def _refuse_scale(self, position: int, name: str, *, has_pairs: bool) -> None:
        if _ACTIVATION.search(name):
            if not has_pairs:
                self._fail(position, "is a scale, but no weight has one")
            if self._table.elements[position] != 1:
                self._fail(position, f"has shape {self._table.shape(position)}, but scales of activations are single")
            return
        stem = re.sub(_ANY_SCALE, "", name)
        owners = [self._positions[n] for n in (stem, f"{stem}.weight") if n in self._positions]
        if any(self._dtypes[i].is_fp8 for i in owners):
            self._fail(position, "is a scale of an 8-bit float, by a name that is not understood")
        if _SURELY_SCALE.search(name):
            owner = next((self._dtypes[i].name for i in owners), None)
            self._fail(position, f"is the scale of a weight that is {owner or 'not there'}, and not of an 8-bit float")

    def _refuse_exponents(self) -> None:
        for i, dtype in enumerate(self._dtypes):
            if dtype.name == "F8_E8M0":
                self._fail(i, "holds powers of two that scale blocks of other numbers (MX formats)")

    def _refuse_integers(self) -> None:
        for i, dtype in enumerate(self._dtypes):
            match = _PACKED.fullmatch(self._table.names[i]) if dtype.name in _INTEGERS else None
            scale = next((match[1] + s for s in _OF_PACKED if match and match[1] + s in self._positions), None)
            if scale is not None:
                self._fail(i, f"is a weight as {dtype.name} with scales in {scale}")

    def _fail(self, position: int, what: str, advice: str = _ADVICE) -> NoReturn:
        shards, path = self._checkpoint.shards, self._checkpoint.path
        file = shards[int(self._table.shards[position])].path if shards else path
        raise UnsupportedDTypeError(
            f"{self._table.names[position]}: in {file}, {what}: the raw numbers must not be averaged. {advice}",
            path=path,
        )


def block_of(folder: Path | None) -> Block:
    """Read the size of blocks from a folder's ``config.json``; 128 × 128 where nothing is said.

    Raises
    ------
    CheckpointError
        If what is said is no size, or the file is no JSON or too large.
    """
    config = None if folder is None else folder / "config.json"
    if config is None or not config.exists():
        return DEFAULT_BLOCK
    raw, _ = read_config(config)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{config}: cannot be read as JSON, but may say how large the blocks of scales are. Mend it, or remove it "
            "if they are 128x128.",
            path=str(folder),
        ) from None
    for found in _sizes(document):
        if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or n < 1 for n in found):
            raise CheckpointError(
                f"{config}: {found!r} is no size of blocks, which are two whole numbers such as [128, 128]. "
                "Correct quantization_config.",
                path=str(folder),
            )
        return found[0], found[1]
    return DEFAULT_BLOCK


def _sizes(document: Any) -> Iterator[Any]:
    """Sizes of blocks as transformers (fp8) and compressed-tensors write them."""
    for holder in _objects(document, "", "text_config"):
        for quantisation in _objects(holder, "quantization_config"):
            groups = quantisation.get("config_groups")
            schemes = [
                weights
                for group in (groups.values() if isinstance(groups, dict) else ())
                for weights in _objects(group, "weights")
            ]
            for found in (
                quantisation.get("weight_block_size"),
                *(s.get("block_structure") for s in schemes if s.get("strategy") == "block"),
            ):
                if found is not None:
                    yield found


def _objects(document: Any, *keys: str) -> Iterator[dict[str, Any]]:
    """Values that are objects; those of an object's keys, and itself for the empty key."""
    for key in keys if isinstance(document, dict) else ():
        found = document.get(key) if key else document
        if isinstance(found, dict):
            yield found


def _times(block: Block) -> str:
    return f"{block[0]}x{block[1]}"
