"""Devices that combine tiles, behind one `Backend` protocol; imported only when used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamsoup.errors import RecipeError

if TYPE_CHECKING:
    from streamsoup.backends.protocol import Backend

__all__ = ["open_backend"]


def open_backend(device: str = "cpu") -> Backend:
    """Make the backend for ``cpu``, ``cuda`` or ``cuda:N`` (or ``torch:NAME``: the torch path on any torch device).

    Raises
    ------
    RecipeError
        If there is no such device.
    """
    if device == "cpu":
        from streamsoup.backends.cpu import CpuBackend

        return CpuBackend()
    if device.startswith(("cuda", "torch:")):
        from streamsoup.backends.cuda import TorchBackend

        return TorchBackend(device.removeprefix("torch:"))
    raise RecipeError(f"device {device!r} is neither cpu nor cuda[:n].")
