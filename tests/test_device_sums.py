"""Running sums in the memory of a device: the same bits, and no bytes over the bus but the new ingredient's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from device_pools import same
from factory import read_checkpoint, weights_bytes, write_checkpoint
from fake_lanes import Lane, LateLanes, NarrowLanes
from greedy_pools import equals_its_recipe, make_pool, scorer
from torch import nn

import streamsoup
from streamsoup.backends import cuda
from streamsoup.backends.torch_slot import TorchSlot
from streamsoup.cli import main
from streamsoup.errors import DeviceMemoryError, RecipeError
from streamsoup.pool import Pool, PoolOptions
from streamsoup.sums.device_store import DeviceStore

ON = {"device": "torch:cpu", "sums": "device"}


@pytest.fixture
def lifted(monkeypatch):
    """Bytes that go up, by the ingredient's place."""
    found = []
    real = TorchSlot._lift

    def lift(self, held, itemsizes, begin, count):
        found.append([None if there is not None else size * count for there, size in zip(held, itemsizes, strict=True)])
        real(self, held, itemsizes, begin, count)

    monkeypatch.setattr(TorchSlot, "_lift", lift)
    return found


@pytest.mark.parametrize("device", ["torch:cpu", "torch:cpu,torch:cpu"])
@pytest.mark.parametrize("sums_dtype", ["float64", "float32"])
@pytest.mark.parametrize("rule", [{}, {"prune": True}, {"order": "given", "rounds": 2}], ids=str)
def test_a_greedy_soup_is_the_same_with_its_sum_on_the_device(tmp_path, device, sums_dtype, rule):
    runs, target = make_pool(tmp_path / "runs", 6, bad=(1, 4))
    found = {}
    for place, options in (("host", {}), ("device", {"device": device, "sums": "device"})):
        result = streamsoup.greedy(
            runs, tmp_path / place, score=scorer(target, []), workdir=tmp_path / f"{place}.work",
            budget_bytes="200MiB", sums_dtype=sums_dtype, **{"sums": "host", **options}, **rule,
        )  # fmt: skip
        assert not (tmp_path / f"{place}.work" / "sums").exists()
        found[place] = [(t.path, t.score, t.accepted) for t in result.trials], weights_bytes(tmp_path / place)
    assert found["host"] == found["device"]
    assert equals_its_recipe(tmp_path / "device", tmp_path)


@pytest.mark.parametrize("when", [{}, {"eager": Lane.UP}, {"eager": Lane.RUN}, {"seed": 0}, {"seed": 1}], ids=str)
def test_bits_are_the_same_however_late_the_lanes_are(tmp_path, monkeypatch, when):
    monkeypatch.setattr(cuda, "open_lanes", lambda device: LateLanes(device, **when))
    runs, _ = make_pool(tmp_path / "runs", 4)
    made = {}
    for place, options in (("host", {}), ("device", ON)):
        running = streamsoup.RunningSoup(runs, budget_bytes="200MiB", **options)
        running.add(runs[0]).add(runs[1], 2.0).add(runs[2])
        running.candidate(runs[3]).write(tmp_path / place / "more")
        running.remove(runs[1]).mean().write(tmp_path / place / "less")
        made[place] = [read_checkpoint(tmp_path / place / name) for name in ("more", "less")]
    assert all(same(a, b) for a, b in zip(made["host"], made["device"], strict=True))


def test_a_trial_lifts_the_new_ingredient_alone_and_writes_into_the_module(tmp_path, lifted):
    """Of a module on the same device nothing comes down, either."""
    torch.manual_seed(0)
    module = nn.Linear(300, 70).bfloat16()
    runs = []
    for number in range(3):
        state = {name: torch.randn(value.shape).bfloat16() for name, value in module.state_dict().items()}
        arrays = {n: v.view(torch.int16).numpy().view(np.uint16) for n, v in state.items()}
        import ml_dtypes

        tensors = {n: a.view(ml_dtypes.bfloat16) for n, a in arrays.items()}
        runs.append(str(write_checkpoint(tmp_path / f"run{number}", tensors)))
    running = streamsoup.RunningSoup(runs, budget_bytes="200MiB", **ON)
    running.add(runs[0]).add(runs[1])
    lifted.clear()
    running.candidate(runs[2]).load_into(module)
    assert lifted
    assert all(sizes[0] is None and sizes[1] for sizes in lifted), "the sum stays where it is"
    streamsoup.soup(runs, tmp_path / "soup")
    for name, array in read_checkpoint(tmp_path / "soup").items():
        assert module.state_dict()[name].view(torch.int16).numpy().tobytes() == array.tobytes(), name
    lifted.clear()
    running.mean().load_into(module)
    assert all(sizes == [None] for sizes in lifted), "nothing goes up"


def test_what_another_device_needs_comes_through_the_host(tmp_path, monkeypatch):
    runs, _ = make_pool(tmp_path / "runs", 3)
    monkeypatch.setattr(DeviceStore, "resident", lambda *_: None)
    running = streamsoup.RunningSoup(runs, budget_bytes="200MiB", **ON).add(runs[0]).add(runs[1]).add(runs[2])
    running.mean().write(tmp_path / "mean")
    streamsoup.soup(runs, tmp_path / "soup")
    assert same(read_checkpoint(tmp_path / "mean"), read_checkpoint(tmp_path / "soup"))


def test_it_is_saved_and_taken_up(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 3)
    running = streamsoup.RunningSoup(runs, budget_bytes="200MiB", **ON).add(runs[0]).add(runs[1])
    running.save(tmp_path / "sums")
    with streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes="200MiB") as again:
        again.mean().write(tmp_path / "one")
    running.mean().write(tmp_path / "two")
    assert same(read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two"))


def test_after_a_failure_it_is_made_anew(tmp_path, monkeypatch):
    runs, _ = make_pool(tmp_path / "runs", 3)
    running = streamsoup.RunningSoup(runs, budget_bytes="200MiB", **ON).add(runs[0]).add(runs[1])
    with monkeypatch.context() as patch:
        patch.setattr(DeviceStore, "commit", lambda *_: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OSError, match="no"):
            running.add(runs[2])
    running.add(runs[2]).mean().write(tmp_path / "mean")
    streamsoup.soup(runs, tmp_path / "soup")
    assert same(read_checkpoint(tmp_path / "mean"), read_checkpoint(tmp_path / "soup"))


def test_the_place_is_chosen_by_room_and_slots_have_the_less(tmp_path, monkeypatch):
    runs, _ = make_pool(tmp_path / "runs", 2)
    options = {"device": "torch:cpu", "device_budget_bytes": 256 << 20, "budget_bytes": 256 << 20}
    pool = Pool(runs, PoolOptions(**options))
    assert pool.sum_place == "host", "torch's own cpu has no memory of its own"
    monkeypatch.setattr(type(pool.backend), "bytes_to_hold", property(lambda self: pool.sum_bytes))
    assert pool.sum_place == "device"
    monkeypatch.setattr(type(pool.backend), "bytes_to_hold", property(lambda self: pool.sum_bytes - 1))
    assert pool.sum_place == "host"
    plan = pool.plan(list(pool.checkpoints.values()), streamsoup.methods.Coefficients((1.0, 1.0)))
    (before,) = pool.backend.shares(plan.tiling, plan.needs)
    held = pool.backend.hold(100 << 20)
    (after,) = pool.backend.shares(plan.tiling, plan.needs)
    assert before.budget_bytes - after.budget_bytes == 100 << 20
    del held
    assert pool.backend.shares(plan.tiling, plan.needs) == (before,)


def test_no_room_is_one_clear_sentence(tmp_path, monkeypatch, capfd):
    runs, _ = make_pool(tmp_path / "runs", 3)
    with pytest.raises(DeviceMemoryError, match="running sum takes") as caught:
        Pool(runs, PoolOptions(device="torch:cpu", device_budget_bytes=64 << 20)).backend.hold(65 << 20)
    for word in ("--sums host", "--sums-dtype float32", "--device-budget"):
        assert word in str(caught.value)
    monkeypatch.setattr(cuda, "open_lanes", NarrowLanes)
    monkeypatch.setattr(NarrowLanes, "most_bytes", 1000)
    with pytest.raises(DeviceMemoryError, match="running sum takes"):
        streamsoup.RunningSoup(runs, **ON)
    with pytest.raises(RecipeError, match="no memory but the host's"):
        streamsoup.RunningSoup(runs, sums="device")
    assert main(["greedy", *runs, "--score", "echo 1", "-o", str(tmp_path / "soup"), "--sums", "device"]) == 1
    assert "no memory but the host's" in capfd.readouterr().err
    assert not (tmp_path / "soup").exists()


def test_the_plan_says_where_the_sum_is(tmp_path, capfd):
    runs, _ = make_pool(tmp_path / "runs", 3)
    arguments = ["greedy", *runs, "--score", "echo 1", "-o", str(tmp_path / "soup"), "--dry-run"]
    assert main([*arguments, "--sums", "device", "--device", "torch:cpu"]) == 0
    assert "on the device" in capfd.readouterr().out
    assert main(arguments) == 0
    assert "in memory" in capfd.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("sums_dtype", ["float64", "float32"])
def test_on_a_gpu_a_greedy_soup_is_that_of_the_cpu(tmp_path, sums_dtype):
    runs, target = make_pool(tmp_path / "runs", 6, bad=(1, 4))
    found = {}
    for place, options in (("host", {}), ("device", {"device": "cuda", "sums": "device"})):
        result = streamsoup.greedy(
            runs, tmp_path / place, score=scorer(target, []), workdir=tmp_path / f"{place}.work",
            sums_dtype=sums_dtype, **options,
        )  # fmt: skip
        found[place] = [(t.path, t.score, t.accepted) for t in result.trials], weights_bytes(tmp_path / place)
    assert found["host"] == found["device"]


@pytest.mark.gpu
def test_on_a_gpu_a_candidate_is_loaded_into_a_module_there(tmp_path, lifted):
    module = nn.Linear(300, 70).bfloat16().cuda()
    runs = []
    for number in range(3):
        tensors = {n: np.random.default_rng(number).normal(size=tuple(v.shape)).astype(np.float32) for n, v in
                   module.state_dict().items()}  # fmt: skip
        runs.append(str(write_checkpoint(tmp_path / f"run{number}", tensors)))
    running = streamsoup.RunningSoup(runs, device="cuda", sums="device", dtype="bfloat16").add(runs[0]).add(runs[1])
    lifted.clear()
    running.candidate(runs[2]).load_into(module)
    assert all(sizes[0] is None for sizes in lifted)
    streamsoup.soup(runs, tmp_path / "soup", dtype="bfloat16")
    for name, array in read_checkpoint(tmp_path / "soup").items():
        assert module.state_dict()[name].cpu().view(torch.int16).numpy().tobytes() == array.tobytes()
