"""The torch backend: one device or several, each with lanes of its own, bit-identical to the CPU's kernels.

It runs on ``cuda`` and, for tests, on torch's own ``cpu``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch

from streamsoup.backends.lanes import Lanes, open_lanes
from streamsoup.backends.torch_slot import TorchSlot
from streamsoup.device_share import DeviceShare, share_device
from streamsoup.errors import DeviceMemoryError, RecipeError
from streamsoup.tiling import TileNeeds, Tiling
from streamsoup.units import format_binary

# Of what is free on a GPU: others may come, and the framework keeps some memory for itself.
_DEFAULT_SHARE = 2
# Where nobody knows what is free.
_DEFAULT_BYTES = 1 << 30
# Of a device's budget, for a running sum: the rest is for tiles.
_HELD_SHARE = 2


class TorchBackend:
    """See `Backend`. Slots are dealt to its devices in turn; a device that is faster does more tiles.

    Parameters
    ----------
    devices : sequence of str
        Any devices of torch.
    budget_bytes : int, optional
        Of each device's memory; by default half of what is free.

    Raises
    ------
    RecipeError
        If torch cannot use one of them.
    """

    def __init__(self, devices: Sequence[str], budget_bytes: int | None = None) -> None:
        self._lanes = [_open(device) for device in devices]
        known = [lanes.device for lanes in self._lanes if lanes.device.type != "cpu"]
        if len(set(known)) < len(known):
            raise RecipeError(f"device {','.join(devices)!r}: names one device twice. Name it once.")
        self._budgets = [budget_bytes or _default_budget(lanes) for lanes in self._lanes]
        self._held_bytes = 0
        self._next = itertools.cycle(range(len(self._lanes)))
        self.name = ",".join(str(lanes.device) for lanes in self._lanes)

    def prepare(
        self, *, wide: bool, fp8: bool, single: bool = False, measured: bool = False, surveyed: bool = False
    ) -> None:
        """See `Backend`."""
        from streamsoup.kernels import torch_combine, triton_combine  # noqa: F401

        for lanes in self._lanes:
            triton_combine.is_available(lanes.device)  # compiles on a GPU, which is not the run's memory

    def shares(self, tiling: Tiling, needs: TileNeeds) -> tuple[DeviceShare, ...]:
        """See `Backend`."""
        return tuple(self._share(k, tiling, needs) for k in range(len(self._lanes)))

    def _share(self, number: int, tiling: Tiling, needs: TileNeeds) -> DeviceShare:
        device, budget = str(self._lanes[number].device), self._budgets[number] - (0 if number else self._held_bytes)
        return share_device(device, needs, tiling, devices=len(self._lanes), budget_bytes=budget)

    def slot(self, tiling: Tiling, needs: TileNeeds) -> TorchSlot:
        """See `Backend`."""
        number = next(self._next)
        return TorchSlot(self._lanes[number], self._share(number, tiling, needs), tiling, needs)

    @property
    def bytes_to_hold(self) -> int:
        """See `Backend`."""
        if self._lanes[0].device.type == "cpu":  # torch's own cpu has the host's memory
            return 0
        return self._budgets[0] // _HELD_SHARE

    def hold(self, nbytes: int) -> torch.Tensor:
        """See `Backend`."""
        lanes, room = self._lanes[0], self._budgets[0] - self._held_bytes
        try:
            if nbytes > room:
                raise torch.OutOfMemoryError
            found = lanes.memory(nbytes)
        except torch.OutOfMemoryError:
            raise DeviceMemoryError(
                f"device {lanes.device}: the running sum takes {format_binary(nbytes)} of its memory, of which "
                f"{format_binary(room)} may be used. Give --sums host, --sums-dtype float32 or a larger "
                "--device-budget.",
                device=str(lanes.device),
                wanted_bytes=nbytes,
            ) from None
        self._held_bytes += nbytes
        weakref.finalize(found, self._let_go, nbytes)
        return found

    def _let_go(self, nbytes: int) -> None:
        self._held_bytes -= nbytes

    def digest(self, address: int, nbytes: int, itemsize: int, first_block: int) -> int:
        """See `Backend`."""
        from streamsoup.kernels import torch_combine
        from streamsoup.maps import bytes_at

        found = torch_combine.digest(torch.from_numpy(bytes_at(address, nbytes).copy()), itemsize, first_block)
        return int(found) % 2**64


def _default_budget(lanes: Lanes) -> int:
    free = lanes.free_bytes()
    return _DEFAULT_BYTES if free is None else free // _DEFAULT_SHARE


def _open(name: str) -> Lanes:
    try:
        device = torch.empty(1, device=name).device  # with its number: cuda is not equal to cuda:0
        return open_lanes(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"device {name!r} cannot be used here ({reason}). Use --device cpu.") from error
