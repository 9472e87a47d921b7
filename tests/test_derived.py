"""Ingredients that are computed as they are read: the bits of the files that would hold them, by every way."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from factory import read_checkpoint, same_bits, write_checkpoint
from numpy.testing import assert_array_equal

import streamsoup
from streamsoup import checkpoints
from streamsoup.checkpoints import DerivedCheckpoint, identify, open_checkpoints, select
from streamsoup.dtypes import BY_NAME
from streamsoup.errors import BudgetError, ChangedIngredientError
from streamsoup.maps import address_of, bytes_at
from streamsoup.read import open_sources
from streamsoup.source import STRIP_BYTES, Source

SHAPES = {"layers.0.w": (70, 1300), "layers.1.w": (300_000,), "layers.2.w": (3, 5, 7), "empty": (0, 4), "one": ()}
COUNT = 3


@dataclass(frozen=True)
class Halved(DerivedCheckpoint):
    """The float32 tensors of a checkpoint, halved, which is exact; of bfloat16, as people think of it."""

    def derive(self, parts):
        return HalvedSource(parts[0], self.table)


class HalvedSource(Source):
    def __init__(self, part, table):
        self._part = part
        self._table = table

    def fetch(self, position, offset, nbytes, staging):
        if self._table.dtype(position).name != "F32":
            with self._part.view(position, offset, nbytes) as stored:
                staging[:] = stored.data
            return address_of(staging)
        target = np.frombuffer(staging, np.float32)
        for start in range(0, nbytes, STRIP_BYTES):
            size = min(STRIP_BYTES, nbytes - start)
            with self._part.view(position, offset + start, size) as stored:
                target[start // 4 : (start + size) // 4] = stored.view(np.float32) * np.float32(0.5)
        return address_of(staging)

    def load(self, position, offset, nbytes):
        self._part.source.load(position, offset, nbytes)

    def close(self):
        self._part.source.close()


def halves_of(array):
    return array * np.float32(0.5) if array.dtype == np.float32 else array


def halved(part):
    bfloat16 = np.full(len(part.table), BY_NAME["BF16"].index, np.uint8)
    dtypes = np.where(part.table.dtypes == BY_NAME["F32"].index, bfloat16, part.table.dtypes)
    return Halved(part.path, part.folder, (part,), part.table, part.metadata, dtypes, STRIP_BYTES)


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    floats = [{n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(COUNT)]
    return [{**run, "ids": np.arange(9)} for run in floats]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tensors):
    """Checkpoints, and beside each the file of what comes of it when it is halved."""
    folder = tmp_path_factory.mktemp("derived")
    for i, run in enumerate(tensors):
        write_checkpoint(folder / f"halved-{i}", run, shards=2, pad=1 + i)
        write_checkpoint(folder / f"plain-{i}", {n: halves_of(a) for n, a in run.items()}, shards=2)
    return folder


@pytest.fixture(autouse=True)
def _opened(monkeypatch):
    before = checkpoints._open

    def opened(path, parsed, key):
        found = before(path, parsed, key)
        return halved(found) if "halved-" in path else found

    monkeypatch.setattr(checkpoints, "_open", opened)


def soup_of(tmp_path, paths, name, **options):
    streamsoup.soup(paths, tmp_path / name, **options)
    return read_checkpoint(tmp_path / name)


def mixed(runs, kind):
    return [str(runs / f"{kind}-0"), str(runs / "plain-1"), str(runs / f"{kind}-2")]


@pytest.mark.parametrize(
    ("read_mode", "workers", "device"), list(itertools.product(["map", "ahead", "plain"], [1, 3], ["cpu", "torch:cpu"]))
)
def test_a_soup_has_the_bits_of_the_files(tmp_path, runs, read_mode, workers, device, monkeypatch):
    expected = soup_of(tmp_path, mixed(runs, "plain"), "expected", dtype="bfloat16")
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    found = soup_of(
        tmp_path, mixed(runs, "halved"), "found", read_mode=read_mode, workers=workers, device=device, dtype="bfloat16"
    )
    assert same_bits(found, expected)


def test_the_first_one_says_what_is_written(tmp_path, runs):
    found = soup_of(tmp_path, mixed(runs, "halved"), "found")
    assert same_bits(found, soup_of(tmp_path, mixed(runs, "plain"), "expected", dtype="bfloat16"))


@pytest.mark.parametrize("method", ["karcher", "ties"])
def test_measured_methods(tmp_path, runs, method):
    options = {"method": method, "dtype": "float32", "base": str(runs / "plain-1")}
    paths = [[str(runs / f"{kind}-0"), str(runs / f"{kind}-2")] for kind in ("halved", "plain")]
    found, expected = (soup_of(tmp_path, p, str(i), **options) for i, p in enumerate(paths))
    assert same_bits(found, expected)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_running_sums_and_greedy(tmp_path, runs, place):
    results = []
    for kind in ("halved", "plain"):
        result = streamsoup.greedy(
            mixed(runs, kind),
            score=lambda candidate: 1.0,
            out=tmp_path / f"greedy-{kind}",
            sums=place,
            workdir=tmp_path / f"work-{kind}",
            dtype="bfloat16",
        )
        results.append([(trial.accepted, trial.score) for trial in result.trials])
    assert results[0] == results[1]
    assert same_bits(read_checkpoint(tmp_path / "greedy-halved"), read_checkpoint(tmp_path / "greedy-plain"))


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_running_sum_takes_what_is_copied_from_one(tmp_path, runs, tensors, on_disk):
    paths = [str(runs / "halved-0"), str(runs / "halved-2")]
    folder = tmp_path / "sum" if on_disk else None
    with streamsoup.RunningSoup(paths, folder=folder, dtype="float32") as running:
        for path in paths:
            running.add(path)
        found = running.mean().tensors()
    assert found["ids"].tolist() == list(range(9))
    expected = soup_of(tmp_path, paths, "soup", dtype="float32")
    assert_array_equal(found["layers.1.w"].numpy(), expected["layers.1.w"])


def test_tensors_can_be_picked_and_named_anew(tmp_path, runs, tensors):
    (whole,) = open_checkpoints([str(runs / "halved-0")])
    position = whole.table.positions()["layers.1.w"]
    picked = select(whole, np.array([position]), ("w",))
    picked = select(select(picked, np.array([0, 0])), np.array([1]), ("v",))
    assert picked.table.names == ("v",)
    assert picked.table.shape(0) == (300_000,)
    assert picked.out_dtypes.tolist() == [BY_NAME["BF16"].index]
    assert identify(picked) == identify(whole)
    room = np.empty(400, np.uint8)
    with open_sources([picked], "map") as (source,):
        address = source.fetch(0, 4000, 400, room.data)
        found = bytes_at(address, 400).view(np.float32)
        assert_array_equal(found, tensors[0]["layers.1.w"][1000:1100] * np.float32(0.5))


def test_the_stored_bytes_are_what_is_known_again(tmp_path, runs, tensors):
    write_checkpoint(tmp_path / "halved-0", tensors[0])
    (checkpoint,) = open_checkpoints([str(tmp_path / "halved-0")])
    before = identify(checkpoint)
    assert len(before) == len(checkpoint.shards) == 1
    changed = {**tensors[0], "layers.1.w": tensors[0]["layers.1.w"] + 1}
    write_checkpoint(tmp_path / "halved-0", changed)
    with pytest.raises(ChangedIngredientError):
        identify(checkpoint)
    (again,) = open_checkpoints([str(tmp_path / "halved-0")])
    assert identify(again)[0].sampled_blake2b != before[0].sampled_blake2b


def test_what_is_held_meanwhile_counts_in_the_budget(tmp_path, runs, monkeypatch):
    def plan_of(kind, **options):
        execution = streamsoup.Execution(workers=2, budget_bytes=1 << 28, **options)
        return streamsoup.plan_soup(
            streamsoup.Recipe(tuple(map(streamsoup.Ingredient, mixed(runs, kind)))), None, execution
        )[0]

    computed, stored = plan_of("halved"), plan_of("plain", read_mode="plain")
    assert computed.staged
    assert computed.needs.reserved_bytes == (2 + computed.needs.readers) * STRIP_BYTES
    assert computed.projected_peak_bytes > stored.projected_peak_bytes
    with pytest.raises(BudgetError):
        streamsoup.soup(mixed(runs, "halved"), tmp_path / "soup", budget_bytes="8MiB")
