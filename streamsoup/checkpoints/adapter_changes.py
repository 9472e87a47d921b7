"""Which tensors of a base an adapter changes, and how: names and shapes settled before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints.adapter_config import AdapterConfig
from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.dtypes import BY_NAME, DType
from streamsoup.errors import CheckpointError

_PREFIX = "base_model.model."
# PEFT leaves the name of the adapter out of the file; whoever saved a whole state dict has it in.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.weight)?"
)
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Factors:
    """Positions of a module's factors in the table of its adapter, and whether they are those of an embedding."""

    a: int
    b: int
    embedding: bool


@dataclass(frozen=True)
class Changes:
    """What becomes of each tensor of a base; arrays of shape (tensors,), positions in the adapter's table or -1.

    Attributes
    ----------
    replaced : int32 array
        The tensor that stands in the base's place.
    a, b : int32 arrays
        The factors of what is added.
    transposed : bool array
        Whether ``(B·A)ᵀ`` is added, and not ``B·A``.
    scales : float64 array
    """

    replaced: npt.NDArray[np.int32]
    a: npt.NDArray[np.int32]
    b: npt.NDArray[np.int32]
    transposed: npt.NDArray[np.bool_]
    scales: npt.NDArray[np.float64]


class Matching:
    """Matches the tensors of an adapter with those of a base.

    Parameters
    ----------
    base, adapter : Checkpoint
    config : AdapterConfig
    """

    def __init__(self, base: Checkpoint, adapter: Checkpoint, config: AdapterConfig) -> None:
        self._base, self._adapter, self._config = base, adapter, config
        self._positions = base.table.positions()
        count = len(base.table)
        replaced, a, b = (np.full(count, -1, np.int32) for _ in range(3))
        self._changes = Changes(replaced, a, b, np.zeros(count, np.bool_), np.ones(count))
        self._square: list[str] = []
        self._unlike_config: list[str] = []

    def match(self) -> Changes:
        """Settle all, and refuse what fits nowhere.

        Raises
        ------
        CheckpointError
            Naming the first tensor at fault.
        """
        factors, others = self._sorted()
        if not factors and not others:
            self._fail("has no tensors", "Save the adapter again.")
        for name, position in others.items():
            self._replace(name, position)
        for module, found in factors.items():
            self._add(module, found)
        if self._square and self._unlike_config:
            self._fail(
                f"fan_in_fan_out is {str(self._config.fan_in_fan_out).lower()}, but the factors of "
                f"{self._unlike_config[0]} only fit otherwise, so it cannot be told how those of the square "
                f"{self._square[0]} are meant",
                "Merge the adapter with peft first.",
            )
        return self._changes

    def _fail(self, what: str, advice: str) -> NoReturn:
        raise CheckpointError(f"{self._adapter.path}: {what}. {advice}", path=self._adapter.path)

    def _sorted(self) -> tuple[dict[str, Factors], dict[str, int]]:
        """Tell factors from tensors that were trained whole; of these, by the names that they have in the base."""
        halves: dict[tuple[str, str], dict[str, int]] = {}
        others: dict[str, int] = {}
        names = self._adapter.table.names
        for position, name in enumerate(names):
            found = _FACTOR.fullmatch(name.removeprefix(_PREFIX))
            if found:
                pair = halves.setdefault((found["module"], found["kind"] or ""), {})
                if found["factor"] in pair:
                    self._fail(f"{names[pair[found['factor']]]} and {name} are the same factor", "Keep one of them.")
                pair[found["factor"]] = position
            elif "lora_" in name:
                what = "of DoRA" if "magnitude" in name else "of an unknown kind"
                self._fail(f"{name} is a factor {what}, which is not supported", "Merge the adapter with peft first.")
            elif ".original_module." not in name:  # the base's own tensor, which the trained one stands in for
                own = _name_in_base(name)
                spellings = [names[others[own]], name] if own in others else [name]
                # With bias "all" peft writes the bias of a module to save a second time, under its inner name.
                plain = [spelling for spelling in spellings if ".modules_to_save." not in spelling] or spellings
                if len(plain) > 1:
                    self._fail(f"{plain[0]} and {plain[1]} are the same tensor", "Keep one of them.")
                if plain == [name]:
                    others[own] = position
        return self._paired(halves), others

    def _paired(self, halves: Mapping[tuple[str, str], Mapping[str, int]]) -> dict[str, Factors]:
        factors: dict[str, Factors] = {}
        for (module, kind), pair in halves.items():
            if len(pair) == 1 or module in factors:
                name = self._adapter.table.names[next(iter(pair.values()))]
                other = f"lora_{kind}{'B' if 'A' in pair else 'A'}"
                what = f"but no {other} of the same module" if len(pair) == 1 else "and other factors of its module"
                self._fail(f"has {name} {what}", "Save the adapter again.")
            factors[module] = Factors(pair["A"], pair["B"], bool(kind))
        return factors

    def _replace(self, name: str, position: int) -> None:
        base, adapter = self._base.table, self._adapter.table
        key = adapter.names[position]
        if name not in self._positions:
            self._fail(
                f"{key} was trained, but {self._base.path} has no tensor {name}",
                "Name the base that the adapter was trained on, saved with all modules that it trains.",
            )
        place = self._positions[name]
        mine, theirs = base.dtype(place), adapter.dtype(position)
        if (a := base.shape(place)) != (b := adapter.shape(position)):
            self._fail(f"{key} has shape {b}, but {name} of {self._base.path} has {a}", "Name the adapter's own base.")
        if mine is not theirs and not (mine.is_float and theirs.is_float):
            self._fail(
                f"{key} is {theirs.name}, but {name} of {self._base.path} is {mine.name}",
                "Name the adapter's own base.",
            )
        self._changes.replaced[place] = position

    def _add(self, module: str, factors: Factors) -> None:
        name = f"{module}.weight"
        table = self._adapter.table
        key = table.names[factors.a]
        if name not in self._positions:
            why = f"has no tensor {name}"
            if any(f"{module}.{form}" in self._positions for form in ("qweight", "weight_packed", "weight.absmax")):
                why = f"holds {module} quantised"
            self._fail(
                f"{key} changes {module}, but {self._base.path} {why}", "Name the adapter's own base, unquantised."
            )
        place = self._positions[name]
        self._expect_floats(name, place, factors)
        rank = self._config.rank_of(module)
        shape_a, shape_b = table.shape(factors.a), table.shape(factors.b)
        if shape_a[:1] != (rank,):
            self._fail(
                f"{key} has shape {shape_a}, but {self._config.path} says that the rank of {module} is {rank}",
                "Put the configuration back that the adapter was saved with.",
            )
        shape = self._base.table.shape(place)
        flipped = self._is_transposed(module, factors, shape, rank)
        if flipped is None:
            self._fail(
                f"{key} and {table.names[factors.b]} have shapes {shape_a} and {shape_b}, which do not fit "
                f"{name} of {self._base.path} with {shape}",
                "Name the adapter's own base.",
            )
        changes = self._changes
        changes.a[place], changes.b[place], changes.transposed[place] = factors.a, factors.b, flipped
        changes.scales[place] = self._config.scale_of(module)

    def _is_transposed(self, module: str, factors: Factors, shape: tuple[int, ...], rank: int) -> bool | None:
        """Tell whether factors fit a weight transposed or not; None: neither.

        Of a linear module PEFT knows the class, and corrects `fan_in_fan_out` by it. Shapes tell as much unless they
        are square.
        """
        shape_a, shape_b = (self._adapter.table.shape(place) for place in (factors.a, factors.b))
        if len(shape) < 2:
            return None
        kernel = (1,) * (len(shape) - 2)
        straight = not factors.embedding and shape_a == (rank, *shape[1:]) and shape_b == (shape[0], rank, *kernel)
        flipped = len(shape) == 2 and shape_a == (rank, shape[0]) and shape_b == (shape[1], rank)
        if factors.embedding or len(shape) > 2:
            return flipped if straight or flipped else None
        if straight and flipped:
            self._square.append(module)
            return self._config.fan_in_fan_out
        if straight or flipped:
            if flipped != self._config.fan_in_fan_out:
                self._unlike_config.append(module)
            return flipped
        return None

    def _expect_floats(self, name: str, place: int, factors: Factors) -> None:
        replaced = int(self._changes.replaced[place])
        weight: DType = self._base.table.dtype(place) if replaced < 0 else self._adapter.table.dtype(replaced)
        if weight.name not in _FLOATS:
            self._fail(
                f"{name} is {weight.name} in {self._base.path}, but adapters are added to 16, 32 and 64-bit floats",
                "Name the base before it was quantised.",
            )
        for position in (factors.a, factors.b):
            if (dtype := self._adapter.table.dtype(position)).name not in _FLOATS:
                self._fail(
                    f"{self._adapter.table.names[position]} is {dtype.name}, not a 16, 32 or 64-bit float",
                    "Save the adapter again.",
                )


def _name_in_base(name: str) -> str:
    """Return what the base calls a tensor that was trained whole."""
    own = name.removeprefix(_PREFIX)
    for wrapper in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
        own = own.replace(wrapper, ".")
    return own


def changed_dtypes(base: Checkpoint, adapter: Checkpoint, changes: Changes) -> npt.NDArray[np.uint8]:
    """Dtypes of what comes out: float32, or float64 of float64, where factors are added; elsewhere as stored."""
    dtypes = base.table.dtypes.copy()
    replaced = changes.replaced >= 0
    dtypes[replaced] = adapter.table.dtypes[changes.replaced[replaced]]
    dtypes[(changes.a >= 0) & (dtypes != BY_NAME["F64"].index)] = BY_NAME["F32"].index
    return dtypes
