"""Devices that combine tiles, behind one `Backend` protocol; imported only when used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamsoup.devices import check_device_budget, device_names

if TYPE_CHECKING:
    from streamsoup.backends.protocol import Backend

__all__ = ["open_backend"]


def open_backend(device: str = "cpu", device_budget_bytes: int | None = None) -> Backend:
    """Make the backend for some devices.

    Parameters
    ----------
    device : str
        ``cpu``, ``cuda``, ``cuda:N``, several of these as in ``cuda:0,cuda:1``, or ``all`` that CUDA has; or
        ``torch:NAME``: the torch path on any of its devices.
    device_budget_bytes : int, optional
        Of each device's memory; by default half of what is free there.

    Raises
    ------
    RecipeError
        If there is no such device.
    """
    names = device_names(device)
    check_device_budget(device, device_budget_bytes)
    if names == ("cpu",):
        from streamsoup.backends.cpu import CpuBackend

        return CpuBackend()
    from streamsoup.backends.cuda import TorchBackend

    return TorchBackend([name.removeprefix("torch:") for name in names], device_budget_bytes)
