"""Every way to make a soup gives the bits of the plainest one: read modes, threads, devices, sums, and what is made."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from factory import realistic, write_checkpoint

import streamsoup
from streamsoup import tile_queue
from streamsoup.tiling import BLOCK_ELEMENTS

BUDGET = 1 << 28
COUNT = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints with many tiles (a megabyte of elements in 16 tensors) and a reference, made by one thread."""
    folder = tmp_path_factory.mktemp("invariants")
    paths = []
    for i in range(COUNT):
        rng = np.random.default_rng(i)
        tensors = {f"w{k:02d}": rng.standard_normal(60_000 + k).astype(np.float32) for k in range(16)}
        tensors["h"] = rng.standard_normal(5000).astype(np.float16)
        tensors["ids"] = np.arange(7)
        paths.append(str(write_checkpoint(folder / f"run{i}", tensors, shards=3, pad=1 + i)))
    streamsoup.soup(paths, folder / "reference", read_mode="map", workers=1)
    return paths, tensors_of(folder / "reference")


def tensors_of(folder):
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(found, reference):
    return found.keys() == reference.keys() and all(
        found[k].dtype == reference[k].dtype and torch.equal(found[k].view(torch.uint8), reference[k].view(torch.uint8))
        for k in reference
    )


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of a few blocks, and little look-ahead: many tiles are under way at once, and wait for each other."""
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(2 * BLOCK_ELEMENTS, workers)])
    monkeypatch.setattr(tile_queue, "AHEAD_BYTES", 1 << 18)


WAYS = list(itertools.product(["map", "ahead", "plain"], [1, 2, 4], ["cpu", "torch:cpu"]))
WAYS += [("map", 4, "torch:cpu,torch:cpu"), ("ahead", 3, "torch:cpu,torch:cpu,torch:cpu")]


def device_options(device):
    """Several devices, each with memory for a block of each of its slots and little more."""
    return {"device": device, "device_budget_bytes": "1MiB" if "," in device else None}


@pytest.mark.parametrize(("read_mode", "workers", "device"), WAYS)
def test_soup(tmp_path, runs, read_mode, workers, device):
    paths, reference = runs
    streamsoup.soup(
        paths,
        tmp_path / "soup",
        read_mode=read_mode,
        workers=workers,
        budget_bytes=BUDGET,
        shard_size="1MB",
        **device_options(device),
    )
    assert same(tensors_of(tmp_path / "soup"), reference)


class Live(torch.nn.Module):
    """A module with the reference's names and shapes."""

    def __init__(self, reference):
        super().__init__()
        for name, tensor in reference.items():
            self.register_buffer(name, torch.zeros_like(tensor))


@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize(("read_mode", "workers", "device"), WAYS)
def test_sums_and_candidates(tmp_path, runs, read_mode, workers, device, place):
    paths, reference = runs
    folder = tmp_path / "sums" if place == "folder" else None
    options = {"read_mode": read_mode, "workers": workers, "budget_bytes": BUDGET, **device_options(device)}
    with streamsoup.RunningSoup(paths, folder=folder, **options) as running:
        for path in paths[:-1]:
            running.add(path)
        candidate = running.candidate(paths[-1])
        live = Live(reference)
        candidate.load_into(live)
        assert same(dict(live.state_dict()), reference), "load_into"
        candidate.write(tmp_path / "candidate")
        assert same(tensors_of(tmp_path / "candidate"), reference), "write"
        assert same(dict(candidate.tensors()), reference), "tensors"
        running.add(paths[-1])
        running.mean().write(tmp_path / "mean")
        assert same(tensors_of(tmp_path / "mean"), reference), "mean"
        assert running.mean().plan.projected_peak_bytes <= BUDGET


@pytest.mark.parametrize("read_mode", ["map", "ahead", "plain"])
def test_greedy_with_sums_on_disk(tmp_path, runs, read_mode):
    paths, reference = runs
    streamsoup.greedy(
        paths, tmp_path / "soup", score=lambda candidate: float(len(candidate.members)), workdir=tmp_path / "work",
        sums="disk", read_mode=read_mode, workers=4, budget_bytes=BUDGET, order="given",
    )  # fmt: skip
    assert same(tensors_of(tmp_path / "soup"), reference)


@pytest.mark.parametrize("read_mode", ["map", "ahead"])
def test_wide_sums_on_disk(tmp_path, read_mode):
    paths = [
        str(write_checkpoint(tmp_path / f"d{i}", {"w": np.random.default_rng(i).standard_normal(50_000),
                                                   "h": realistic(i, {"h": (9000,)})["h"]}))
        for i in range(3)
    ]  # fmt: skip
    streamsoup.soup(paths, tmp_path / "reference", workers=1)
    with streamsoup.RunningSoup(
        paths, folder=tmp_path / "sums", read_mode=read_mode, workers=4, budget_bytes=BUDGET
    ) as running:
        for path in paths:
            running.add(path)
        running.mean().write(tmp_path / "mean")
    assert same(tensors_of(tmp_path / "mean"), tensors_of(tmp_path / "reference"))
