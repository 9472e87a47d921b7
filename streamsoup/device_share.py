"""What a device holds of a plan: how large the pieces are in which tiles go through it. Pure arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from streamsoup.errors import DeviceMemoryError
from streamsoup.tiling import BLOCK_ELEMENTS, MIB, PARTIAL_ITEMSIZE, TileNeeds, Tiling, found_bytes, piece_elements
from streamsoup.units import format_binary

# What plain torch operations hold beside sources and result: float64 arrays as long as the piece (a test measures
# them). In double-double there are more of them, and one of each source.
_ARRAYS = 10
_WIDE_ARRAYS = 23


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one device holds of a plan.

    Attributes
    ----------
    device : str
    budget_bytes : int
        Of its memory.
    slots : int
        Slots that it has buffers for, at most.
    piece_elements : int
        Elements of a tile that are on the device at a time, of each slot: whole blocks.
    least_elements : int
        Of the smallest piece that would do.
    peak_bytes : int
        Projected: the slots' buffers, and what arithmetic takes for one piece.
    """

    device: str
    budget_bytes: int
    slots: int
    piece_elements: int
    least_elements: int
    peak_bytes: int

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def slot_bytes_on_device(needs: TileNeeds, tiling: Tiling, piece: int) -> int:
    """Bytes of a slot's buffers on its device: a piece of sources and result, partial sums of a tile, what is found."""
    partial = tiling.tile_elements * PARTIAL_ITEMSIZE if tiling.group < needs.ingredients else 0
    return piece * (tiling.group * needs.in_itemsize + needs.out_itemsize) + partial + found_bytes(needs.ingredients)


def working_bytes(needs: TileNeeds, tiling: Tiling, piece: int) -> int:
    """Bytes that combining a piece takes beside a slot's buffers."""
    arrays = _WIDE_ARRAYS + tiling.group if needs.wide else _ARRAYS
    return 8 * arrays * piece


def share_device(device: str, needs: TileNeeds, tiling: Tiling, *, devices: int, budget_bytes: int) -> DeviceShare:
    """Choose the largest pieces that fit a device.

    Parameters
    ----------
    device : str
    needs : TileNeeds
    tiling : Tiling
    devices : int
        Over which the slots are dealt.
    budget_bytes : int
        Of this device's memory.

    Raises
    ------
    DeviceMemoryError
        If the least piece does not fit.
    """
    slots = -(-tiling.workers // devices)

    def peak(piece: int) -> int:
        # One slot at a time is computed with, but measuring and merging wait for results, and may do so side by side.
        each = slot_bytes_on_device(needs, tiling, piece) + needs.held_bytes
        return needs.engines * (slots * each + working_bytes(needs, tiling, piece))

    least = min(tiling.tile_elements, _least_piece(needs))
    if peak(least) > budget_bytes:
        wanted = format_binary(-(-peak(least) // MIB) * MIB)
        raise DeviceMemoryError(
            f"device {device}: {wanted} of its memory are needed at least for {slots} slot(s), but "
            f"{format_binary(budget_bytes)} may be used. Give --device-budget {wanted.replace(' ', '')}, fewer "
            "--threads, or --device cpu.",
            device=device,
            wanted_bytes=peak(least),
        )
    per_block = peak(2 * BLOCK_ELEMENTS) - peak(BLOCK_ELEMENTS)
    fitting = (budget_bytes - peak(0)) // per_block * BLOCK_ELEMENTS
    piece = min(tiling.tile_elements, fitting)
    return DeviceShare(device, budget_bytes, slots, piece, least, peak(piece))


def _least_piece(needs: TileNeeds) -> int:
    """Elements of which a device must have all sources at once: a block, or what a method looks at."""
    measured = piece_elements(needs.ingredients) if needs.held_bytes else BLOCK_ELEMENTS
    return -(-max(needs.least_elements, measured) // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
