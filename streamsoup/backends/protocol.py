"""What the engine asks of a device.

A backend owns its tile slots: buffers that it allocated once, in memory that it likes (pageable, page-locked).
A worker brings a group of ingredients into a slot, has them combined, and gets a token, on which it waits for the
result. The CPU answers at once; a GPU works on several slots meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from streamsoup.device_share import DeviceShare
from streamsoup.measurement import Part
from streamsoup.methods.protocol import Elementwise, TensorInfo
from streamsoup.tiling import TileNeeds, Tiling


@dataclass(frozen=True, slots=True)
class Blend:
    """How one tensor is combined: numbers only.

    Attributes
    ----------
    codes : uint8 array, shape (ingredients,)
        Kernel dtype codes.
    itemsizes : tuple of int
        Bytes an element of each ingredient.
    weights : float64 array, shape (ingredients,)
    divisor : tuple of two floats
        hi + lo.
    hashed : uint8 array, shape (ingredients,)
        Whether to digest its bytes; a running sum is not digested.
    out_code, out_itemsize : int
    wide : bool
        Sum in double-double.
    single : bool
        Sum in float32.
    """

    codes: npt.NDArray[np.uint8]
    itemsizes: tuple[int, ...]
    weights: npt.NDArray[np.float64]
    divisor: tuple[float, float]
    hashed: npt.NDArray[np.uint8]
    out_code: int
    out_itemsize: int
    wide: bool
    single: bool = False


@dataclass(frozen=True, slots=True)
class Portion:
    """Which elements of which tensor lie in a slot.

    Attributes
    ----------
    tensor : TensorInfo
    start, elements : int
    """

    tensor: TensorInfo
    start: int
    elements: int


@dataclass(frozen=True, slots=True)
class Combined:
    """A finished tile.

    Attributes
    ----------
    output : memoryview
        Its bytes; valid until the slot is used again. What was given as `into`, if that was; empty if it lies on a
        device.
    digests : uint64 array, shape (ingredients,)
    nonfinite : int64 array, shape (ingredients,)
        NaN and infinite elements of each ingredient.
    overflowed : int
        Elements too large for the output dtype though all ingredients were finite.
    """

    output: memoryview
    digests: npt.NDArray[np.uint64]
    nonfinite: npt.NDArray[np.int64]
    overflowed: int


class Token(Protocol):
    """Stands for work that was begun."""

    def result(self) -> Combined:
        """Wait for the tile and return it."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A token of work that is done already."""

    combined: Combined

    def result(self) -> Combined:
        """See `Token`."""
        return self.combined


# Where bytes are: an address of the host's memory; or, in the memory of a slot's own device, a uint8 tensor of torch.
Place: TypeAlias = Any
# Where a tile is wanted: a memoryview of the host's memory, or such a tensor.
Room: TypeAlias = Any


class Slot(Protocol):
    """Buffers for one tile.

    Attributes
    ----------
    device : torch.device or None
        In whose memory operands and results may lie; None: in the host's alone.
    """

    @property
    def device(self) -> Any | None: ...

    def staging(self, index: int, nbytes: int) -> memoryview | None:
        """Return where to put the bytes of the group's `index`-th ingredient; None if an address will do."""
        ...

    def buffer(self, index: int, nbytes: int) -> Any | None:
        """Return memory of the device for the group's `index`-th ingredient; None: a buffer there is smaller."""
        ...

    def output(self, nbytes: int) -> memoryview:
        """Return the output buffer, for tensors that are only copied."""
        ...

    def combine(
        self,
        addresses: Sequence[Place],
        blend: Blend,
        first: int,
        elements: int,
        first_block: int,
        into: Room | None = None,
    ) -> Token | None:
        """Combine a group of ingredients: those from `first` on, as many as there are addresses.

        Groups of a tile come in order. The last returns a token, the others None. `into`: where to put the result,
        instead of a buffer of the slot; it may be the very memory of an ingredient of the same itemsize.
        """
        ...

    def look(self, addresses: Sequence[Place], blend: Blend, portion: Portion, part: Part) -> None:
        """Measure a tile: pieces of it are shown to `part`."""
        ...

    def merge(
        self,
        addresses: Sequence[Place],
        blend: Blend,
        portion: Portion,
        rule: Elementwise,
        into: Room | None = None,
    ) -> Token:
        """Combine a tile of all ingredients element by element. `into`: as in `combine`."""
        ...


class Backend(Protocol):
    """A device.

    Attributes
    ----------
    name : str
    """

    @property
    def name(self) -> str: ...

    def prepare(
        self, *, wide: bool, fp8: bool, single: bool = False, measured: bool = False, surveyed: bool = False
    ) -> None:
        """Import and compile what a run will need, so that its memory and time are not counted in the run."""
        ...

    def shares(self, tiling: Tiling, needs: TileNeeds) -> tuple[DeviceShare, ...]:
        """Say what slots will take of each device's memory; nothing, where they have the host's.

        Raises
        ------
        DeviceMemoryError
        """
        ...

    def slot(self, tiling: Tiling, needs: TileNeeds) -> Slot:
        """Allocate a slot.

        Raises
        ------
        DeviceMemoryError
        """
        ...

    def digest(self, address: int, nbytes: int, itemsize: int, first_block: int) -> int:
        """Digest of the bytes of a tile of a tensor that is only copied."""
        ...

    @property
    def bytes_to_hold(self) -> int:
        """Bytes that may be held on the first device all the time; 0: there is no other memory than the host's."""
        ...

    def hold(self, nbytes: int) -> Any:
        """Return memory of the first device, a uint8 tensor of torch; the slots have the less.

        Raises
        ------
        RecipeError
            If there is no device.
        DeviceMemoryError
        """
        ...
