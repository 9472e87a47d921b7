"""Which devices a run is for, and what it has of threads and buffers then."""

from __future__ import annotations

from typing import TypedDict

from streamsoup.budget import worker_count
from streamsoup.errors import RecipeError
from streamsoup.tiling import READERS

# Slots of a device: one is being filled, one copied up, one is computed with, one comes down and is written.
_SLOTS = 4
# Threads that fill page-locked buffers, for each device: a core copies 8 to 12 GB/s from the page cache, and a link to
# a device takes 25 to 55. Not fewer on fewer cores: tiles follow from it, and all ranks must have the same.
_FILLERS = 8


class Means(TypedDict):
    """What a run has of threads and buffers, as `streamsoup.planner.make_plan` takes it."""

    workers: int
    readers: int
    staged: bool
    locked: bool
    ahead: bool


def device_names(device: str) -> tuple[str, ...]:
    """Take a list of devices apart, such as ``cuda:0,cuda:1``; ``all`` are those of CUDA that can be seen.

    Raises
    ------
    RecipeError
        If it names no device, one twice, or the CPU among others.
    """
    if device == "all":
        import torch

        count = torch.cuda.device_count()
        if not count:
            raise RecipeError("device 'all': there is no CUDA device here. Use --device cpu.")
        return tuple(f"cuda:{number}" for number in range(count))
    names = tuple(name.strip() for name in device.split(","))
    for name in names:
        if name != "cpu" and not name.startswith(("cuda", "torch:")):
            raise RecipeError(f"device {name!r} is neither cpu nor cuda, cuda:N or all.")
        if name == "cpu" and len(names) > 1:
            raise RecipeError(f"device {device!r}: the cpu reads for the others. Leave it out, or use it alone.")
        if names.count(name) > 1 and not name.startswith("torch:"):
            raise RecipeError(f"device {device!r}: {name} is named twice. Name it once.")
    return names


def check_device_budget(device: str, budget_bytes: int | None) -> None:
    """Refuse to bound the memory of a device where there is none.

    Raises
    ------
    RecipeError
    """
    if budget_bytes is not None and device == "cpu":
        raise RecipeError(
            "--device-budget bounds the memory of a GPU, but the device is the cpu. Leave it out (--budget bounds what "
            "is owned here), or give --device cuda."
        )


def choose_means(device: str, mode: str, workers: int | None, *, tensor_bytes: float) -> Means:
    """Choose threads and buffers.

    Parameters
    ----------
    device : str
        See `device_names`.
    mode : str
        From `streamsoup.read.choose_mode`.
    workers : int or None
        What was asked for; on devices there is one for each of them at least.
    tensor_bytes : float
        Of an average tensor, in all ingredients together.

    Raises
    ------
    RecipeError
        See `device_names`.

    Notes
    -----
    A worker waits for its device while another's slot is filled, so there are as many slots as stages, and one thread
    of Python for each does: filling is done by readers, who share one slot's ingredients among them.
    """
    names, ahead = device_names(device), mode == "ahead"
    if names == ("cpu",) and mode == "gds":
        raise RecipeError("--read gds goes from storage to a GPU. Give --device cuda, or leave it out.")
    if names == ("cpu",):
        count = worker_count(workers, mode, tensor_bytes=tensor_bytes)
        return Means(workers=count, readers=READERS, staged=mode == "plain", locked=False, ahead=ahead)
    count = _SLOTS * len(names) if workers is None else max(workers, len(names))
    return Means(workers=count, readers=_FILLERS * len(names), staged=True, locked=True, ahead=ahead)
