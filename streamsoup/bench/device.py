"""What devices give at best: copies to, from and on them, and a greedy trial whose operands lie there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from streamsoup.backends.lanes import Lane, Lanes, Mark, open_lanes
from streamsoup.backends.torch_group import Group, combine_into
from streamsoup.bench.report import DEVICE_MEMORY, HOST_TO_DEVICE, Ceiling, Spread
from streamsoup.devices import device_names
from streamsoup.kernels import codes
from streamsoup.tiling import BLOCK_ELEMENTS

# Read and written by a trial for each element: a float64 sum, a bfloat16 ingredient, a bfloat16 candidate.
TRIAL_ITEMSIZE = 8 + 2 + 2
_PIECE = 1024 * BLOCK_ELEMENTS


@dataclass(frozen=True, slots=True)
class _Rig:
    lanes: Lanes
    mark: Mark
    buffers: dict[str, torch.Tensor]


def _timed(rigs: Sequence[_Rig], lane: Lane, work: Callable[[_Rig], Any]) -> float:
    """Put work on all devices at once, and wait for them."""
    began = time.perf_counter()
    for rig in rigs:
        rig.lanes.put(lane, partial(_call, work, rig), then=rig.mark)
    for rig in rigs:
        rig.mark.wait()
    return time.perf_counter() - began


def _call(work: Callable[[_Rig], Any], rig: _Rig) -> None:
    work(rig)


def _open(device: str) -> list[Lanes]:
    return [open_lanes(torch.device(name.removeprefix("torch:"))) for name in device_names(device)]


def copy_seconds(device: str, nbytes: int, repeats: int) -> dict[str, list[float]]:
    """Time copies of page-locked memory to devices, back, and from one place of their memory to another.

    Parameters
    ----------
    device : str
        As in `streamsoup.devices.device_names`; several work side by side.
    nbytes : int
        Of each.
    repeats : int

    Returns
    -------
    dict of ``host to device``, ``device to host``, ``device memory`` to list of seconds
    """
    rigs = []
    for lanes in _open(device):
        buffers = {"here": lanes.host(nbytes).fill_(1), "there": lanes.memory(nbytes), "other": lanes.memory(nbytes)}
        rigs.append(_Rig(lanes, lanes.mark(), buffers))
    ways: dict[str, tuple[Lane, str, str]] = {
        HOST_TO_DEVICE: (Lane.UP, "there", "here"),
        "device to host": (Lane.DOWN, "here", "there"),
        DEVICE_MEMORY: (Lane.RUN, "other", "there"),
    }
    found = {}
    for name, (lane, target, source) in ways.items():

        def copy(rig: _Rig, target: str = target, source: str = source) -> None:
            rig.buffers[target].copy_(rig.buffers[source], non_blocking=True)

        _timed(rigs, lane, copy)
        found[name] = [_timed(rigs, lane, copy) for _ in range(repeats)]
    return found


def trial_seconds(device: str, elements: int, repeats: int) -> list[float]:
    """Time a greedy trial whose operands are resident: a running sum and one ingredient, combined into a candidate.

    Parameters
    ----------
    device : str
    elements : int
        On each device.
    repeats : int

    Notes
    -----
    Bytes moved: `TRIAL_ITEMSIZE` for each element.
    """
    group = Group(
        (codes.F64, codes.BF16), (1.0, 1.0), (False, True), (8, 2), (2.0, 0.0), codes.BF16, 2,
        wide=False, carried=0, first=0, stop=2, count=2,
    )  # fmt: skip
    rigs = []
    for lanes in _open(device):
        sizes = {"sum": 8, "ingredient": 2, "candidate": 2}
        buffers = {name: lanes.memory(size * elements) for name, size in sizes.items()}
        rigs.append(_Rig(lanes, lanes.mark(), buffers))
    _timed(rigs, Lane.RUN, lambda rig: [buffer.zero_() for buffer in rig.buffers.values()])

    def trial(rig: _Rig) -> None:
        total, ingredient, candidate = (rig.buffers[name] for name in ("sum", "ingredient", "candidate"))
        for at in range(0, elements, _PIECE):
            stop = min(at + _PIECE, elements)
            sources = [total[8 * at : 8 * stop], ingredient[2 * at : 2 * stop]]
            combine_into(candidate[2 * at : 2 * stop], sources, group, at // BLOCK_ELEMENTS)

    _timed(rigs, Lane.RUN, trial)
    return [_timed(rigs, Lane.RUN, trial) for _ in range(repeats)]


def measure_copies(device: str, nbytes: int, repeats: int) -> list[Ceiling]:
    """Measure `copy_seconds` as ceilings, of all devices together."""
    devices = len(device_names(device))
    how = f"{nbytes >> 20} MiB, {devices} device(s)"
    found = []
    for name, taken in copy_seconds(device, nbytes, repeats).items():
        inside = name == DEVICE_MEMORY
        words = f"copy of {how}, read and written" if inside else f"{how}, page-locked"
        found.append(Ceiling.of(name, words, devices * nbytes * (1 + inside), taken))
    return found


def measure_trials(device: str, nbytes: int, repeats: int, best: Mapping[str, float]) -> tuple[Spread, float]:
    """Measure `trial_seconds` with so many bytes on each device: rates, and their share of the devices' memory's."""
    elements = max(1, nbytes // TRIAL_ITEMSIZE)
    moved = elements * TRIAL_ITEMSIZE * len(device_names(device))
    rates = Spread.of([moved / seconds / 1e9 for seconds in trial_seconds(device, elements, repeats)])
    return rates, rates.median / best[DEVICE_MEMORY]
