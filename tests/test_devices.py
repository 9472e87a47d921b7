"""Devices of torch: what waits for what, what is held, what happens when there is no memory, and several at once.

Fake lanes do work as late as it may be done, or at random: a wait that is missing changes bits.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from device_pools import COUNT, budget_for, same, write_runs
from factory import realistic, weights_bytes, write_checkpoint
from fake_lanes import Lane, LateLanes, NarrowLanes
from hypothesis import given
from hypothesis import strategies as st
from simmer import plan_for, simmer

import streamsoup
from streamsoup.backends import cuda, open_backend, torch_group
from streamsoup.backends.torch_slot import TorchSlot
from streamsoup.cli import main
from streamsoup.device_share import share_device, slot_bytes_on_device, working_bytes
from streamsoup.devices import choose_means, device_names
from streamsoup.errors import DeviceMemoryError, RecipeError
from streamsoup.methods import linear
from streamsoup.tiling import BLOCK_ELEMENTS, READERS, TileNeeds, choose_tiling, locked_bytes, slot_bytes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("devices"))


@pytest.fixture
def opened(monkeypatch):
    """Fake lanes instead of real ones; returns a function that says of which kind, and the lanes that were opened."""
    lanes = []

    def use(kind=LateLanes, **options):
        def make(device):
            lanes.append(kind(device, **options))
            return lanes[-1]

        monkeypatch.setattr(cuda, "open_lanes", make)
        return lanes

    return use


# -- what waits for what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("when", [{}, {"eager": Lane.UP}, {"eager": Lane.RUN}, {"seed": 0}, {"seed": 1}], ids=str)
def test_bits_are_the_same_however_late_the_lanes_are(runs, opened, group, blocks, when):
    opened(**when)
    weights = [0.3, 0.1, 0.25, 0.2, 0.15]
    sizes = {"group": group, "workers": 2, "tile_blocks": 4}
    reference, expected = simmer(runs, weights, **sizes)
    budget = budget_for(runs, blocks, **sizes)
    found, outcome = simmer(runs, weights, device="torch:cpu", device_budget_bytes=budget, **sizes)
    assert same(found, reference)
    np.testing.assert_array_equal(outcome.digests, expected.digests)


@pytest.mark.parametrize(
    ("deaf", "eager"),
    [((Lane.RUN, Lane.UP), None), ((Lane.DOWN, Lane.RUN), None), ((Lane.UP, Lane.RUN), Lane.UP),
     ((Lane.RUN, Lane.DOWN), Lane.RUN)],
    ids=["run for up", "down for run", "up for run", "run for down"],
)  # fmt: skip
def test_a_lane_that_does_not_wait_is_noticed(runs, opened, deaf, eager):
    opened(eager=eager, deaf=deaf)
    sizes = {"workers": 1, "tile_blocks": 4}
    reference, _ = simmer(runs, **sizes)
    found, _ = simmer(runs, device="torch:cpu", device_budget_bytes=budget_for(runs, 1, **sizes), **sizes)
    assert not same(found, reference)


METHODS = [
    {"method": "slerp", "parameters": {"t": 0.3}, "count": 2},
    {"method": "model_stock"},
    {"method": "ties", "parameters": {"density": 0.4}},
    {"method": "della", "parameters": {"density": 0.5, "epsilon": 0.1}},
    {"method": "sce"},
]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("rule", METHODS, ids=lambda rule: rule["method"])
def test_methods_that_look_have_their_bits_however_late_the_lanes_are(tmp_path, runs, opened, monkeypatch, rule, seed):
    lanes = opened(seed=seed)
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(16 * BLOCK_ELEMENTS, workers)])
    rule = dict(rule)
    paths = runs[1 : 1 + rule.pop("count", 3)]
    results = []
    for device in ("cpu", "torch:cpu", "torch:cpu,torch:cpu"):
        out = tmp_path / f"{device}.safetensors"
        more = {} if device == "cpu" else {"device_budget_bytes": "40MiB"}
        streamsoup.soup(paths, out, base=None if len(paths) == 2 else runs[0], device=device, workers=2, **rule, **more)
        results.append(out.read_bytes())
    assert results[0] == results[1] == results[2]
    assert all(lanes_of.log for lanes_of in lanes)


def one_slot(lanes, elements=3000, group=2, ingredients=2, blocks=2):
    needs = TileNeeds(ingredients, 4, 4, staged=True, largest_elements=elements, locked=True)
    tiling = choose_tiling(needs, budget_bytes=1 << 30, workers=1)
    tiling = dataclasses.replace(tiling, group=group, slot_bytes=slot_bytes(needs, tiling.tile_elements, group))
    share = share_device("cpu", needs, tiling, devices=1, budget_bytes=1 << 30)
    share = dataclasses.replace(share, piece_elements=blocks * BLOCK_ELEMENTS)
    return TorchSlot(lanes, share, tiling, needs)


def blend_of(runs):
    from streamsoup.tile_work import make_blend

    plan = plan_for(runs)
    tensor = plan.table.names.index("b")
    return make_blend(plan, tensor, linear([1.0] * len(runs), normalize=True).numbers)


def test_the_host_waits_for_nothing_but_its_own_slots_last_event(runs):
    lanes = LateLanes(torch.device("cpu"))
    slots = [one_slot(lanes, group=COUNT, ingredients=COUNT) for _ in range(3)]
    blend = blend_of(runs)
    tokens = []
    for slot in slots:
        for i in range(COUNT):
            slot.staging(i, 3000 * blend.itemsizes[i])[:] = bytes(3000 * blend.itemsizes[i])
        tokens.append(slot.combine([0] * COUNT, blend, 0, 3000, 0))
    assert not [entry for entry in lanes.log if entry[0] == "wait"]
    tokens[0].result()
    assert [entry for entry in lanes.log if entry[0] == "wait"] == [("wait", slots[0].down)]
    assert [slot.down.work.is_done for slot in slots] == [True, False, False], "it waited for others' work"


def test_run_waits_for_up_and_down_for_run_and_what_writes_a_buffer_for_what_read_it(runs):
    lanes = LateLanes(torch.device("cpu"))
    slot = one_slot(lanes, group=COUNT, ingredients=COUNT, elements=9000, blocks=1)
    blend = blend_of(runs)
    slot.combine([0] * COUNT, blend, 0, 9000, 0).result()
    allocated, *puts = [entry[1:] for entry in lanes.log if entry[0] == "put"]
    assert allocated == (Lane.RUN, (), slot.ran), "memory may be handed out that arithmetic still uses"
    assert len(puts) > 3, "one piece: nothing is written twice"
    after = {Lane.UP: (slot.ran,), Lane.RUN: (slot.up, slot.down), Lane.DOWN: (slot.ran,)}
    then = {Lane.UP: slot.up, Lane.RUN: slot.ran, Lane.DOWN: slot.down}
    assert puts == [(lane, after[lane], then[lane]) for _ in range(len(puts) // 3) for lane in Lane]


@pytest.mark.parametrize("group", [None, 2])
def test_buffers_are_not_filled_again_before_the_host_has_waited(runs, opened, monkeypatch, group):
    (lanes,) = (opened(),)
    real_staging, real_output = TorchSlot.staging, TorchSlot.output

    def staging(slot, index, nbytes):
        found = real_staging(slot, index, nbytes)
        assert slot.up.work is None or slot.up.work.is_done, "filled while it is copied from"
        if not slot._is_read:
            assert slot.down.work is None or slot.down.work.is_done, "filled before its tile has come down"
        return found

    def output(slot, nbytes):
        assert slot.down.work is None or slot.down.work.is_done
        return real_output(slot, nbytes)

    monkeypatch.setattr(TorchSlot, "staging", staging)
    monkeypatch.setattr(TorchSlot, "output", output)
    simmer(runs, device="torch:cpu", group=group, workers=3, tile_blocks=1)
    marks = {id(entry[3]): entry[1] for entry in lanes[0].log if entry[0] == "put"}
    waited = [marks[id(entry[1])] for entry in lanes[0].log if entry[0] == "wait" and id(entry[1]) in marks]
    assert set(waited) == ({Lane.DOWN} if group is None else {Lane.DOWN, Lane.UP})


# -- what is held --------------------------------------------------------------------------------------------------

needs = st.builds(
    TileNeeds,
    ingredients=st.integers(1, 40),
    in_itemsize=st.sampled_from([1, 2, 4, 8]),
    out_itemsize=st.sampled_from([1, 2, 4, 8]),
    staged=st.just(True),
    locked=st.just(True),
    largest_elements=st.integers(1, 20 * BLOCK_ELEMENTS),
    wide=st.booleans(),
    engines=st.integers(1, 2),
)


@given(needs=needs, group=st.integers(1, 40), workers=st.integers(1, 5), devices=st.integers(1, 3),
       budget=st.integers(1 << 18, 1 << 27))  # fmt: skip
def test_what_is_allocated_is_what_was_projected(needs, group, workers, devices, budget):
    tiling = choose_tiling(needs, budget_bytes=1 << 30, workers=workers)
    group = min(group, needs.ingredients)
    tiling = dataclasses.replace(tiling, group=group, slot_bytes=slot_bytes(needs, tiling.tile_elements, group))
    try:
        share = share_device("cpu", needs, tiling, devices=devices, budget_bytes=budget)
    except DeviceMemoryError as error:
        least = error.wanted_bytes
        share = share_device("cpu", needs, tiling, devices=devices, budget_bytes=least)
        assert share.piece_elements == BLOCK_ELEMENTS
        assert budget < least
        budget = least
    assert share.peak_bytes <= budget
    assert share.slots * devices >= tiling.workers > (share.slots - 1) * devices
    assert share.piece_elements % BLOCK_ELEMENTS == 0
    assert BLOCK_ELEMENTS <= share.piece_elements <= tiling.tile_elements
    lanes = LateLanes(torch.device("cpu"))
    slot = TorchSlot(lanes, share, tiling, needs)
    assert sum(lanes.host_bytes) == slot.host_bytes == tiling.slot_bytes
    assert sum(lanes.device_bytes) == slot.device_bytes == slot_bytes_on_device(needs, tiling, share.piece_elements)
    assert all(size & (size - 1) == 0 for size in lanes.host_bytes)


def test_page_locked_sizes_are_powers_of_two():
    assert [locked_bytes(n) for n in (1, 4096, 4097, 1 << 20, (1 << 20) + 1)] == [4096, 4096, 8192, 1 << 20, 2 << 20]


def test_a_run_allocates_once(runs, opened):
    lanes = opened()
    simmer(runs, device="torch:cpu", workers=2, tile_blocks=1)
    assert len(lanes[0].host_bytes) == 2 * (COUNT + 2)
    assert len(lanes[0].device_bytes) == 2 * (COUNT + 2)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("out_dtype", ["BF16", "F32", "F8_E4M3"])
def test_arithmetic_takes_no_more_than_what_is_projected(tmp_path, wide, out_dtype):
    """Measured by torch's profiler, for the plain operations on one piece."""
    from streamsoup.dtypes import BY_NAME
    from streamsoup.kernels import torch_combine

    elements, count = 64 * BLOCK_ELEMENTS, 6
    sources = [torch.zeros(2 * elements, dtype=torch.uint8) for _ in range(count)]
    arguments = [sources, [BY_NAME["BF16"].kernel_code] * count, [0.3] * count, 1.0, *([0.0] if wide else []), 0,
                 BY_NAME[out_dtype].kernel_code, [True] * count]  # fmt: skip
    function = torch_combine.combine_wide if wide else torch_combine.combine
    function(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*arguments)
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    held = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    needs = TileNeeds(count, 2, 4, staged=True, largest_elements=elements, wide=wide, locked=True)
    tiling = choose_tiling(needs, budget_bytes=1 << 30, workers=1)
    peak = max(held) - min(held)
    assert 0 < peak <= working_bytes(needs, tiling, elements)


# -- no memory -----------------------------------------------------------------------------------------------------


def narrow(monkeypatch, most_elements):
    """Have the kernel run out of memory for more elements than so many."""
    real, tried = torch_group.torch_combine.combine, []

    def combine(sources, codes, *rest, **options):
        elements = sources[-1].numel() // (2 if codes[-1] == 0 else 4)
        tried.append(elements)
        if elements > most_elements:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return real(sources, codes, *rest, **options)

    monkeypatch.setattr(torch_group.torch_combine, "combine", combine)
    return tried


@pytest.mark.parametrize("group", [None, 2])
def test_no_memory_for_a_piece_halves_it_and_changes_no_bit(runs, opened, monkeypatch, group):
    lanes = opened()
    reference, expected = simmer(runs, group=group, tile_blocks=8)
    tried = narrow(monkeypatch, 2 * BLOCK_ELEMENTS)
    found, outcome = simmer(runs, device="torch:cpu", group=group, tile_blocks=8, workers=1)
    assert same(found, reference)
    np.testing.assert_array_equal(outcome.digests, expected.digests)
    assert lanes[0].released == 2, "it does not stay smaller"
    assert max(tried) == 8 * BLOCK_ELEMENTS


def test_no_memory_for_buffers_makes_them_smaller(runs, opened):
    lanes = opened(NarrowLanes)
    NarrowLanes.most_bytes, before = 3 * BLOCK_ELEMENTS * 4, NarrowLanes.most_bytes
    try:
        reference, _ = simmer(runs, tile_blocks=8)
        found, _ = simmer(runs, device="torch:cpu", tile_blocks=8)
        assert same(found, reference)
        assert lanes[0].released
        assert max(lanes[0].device_bytes) == 2 * BLOCK_ELEMENTS * 4
        NarrowLanes.most_bytes = BLOCK_ELEMENTS
        with pytest.raises(DeviceMemoryError, match=r"device cpu: .* cannot be had.*--device-budget.*--threads"):
            simmer(runs, device="torch:cpu")
    finally:
        NarrowLanes.most_bytes = before


def test_no_memory_for_one_block_is_one_clear_error(tmp_path, runs, monkeypatch, capfd):
    tried = narrow(monkeypatch, 0)
    with pytest.raises(DeviceMemoryError) as caught:
        streamsoup.soup(runs, tmp_path / "soup", device="torch:cpu", workers=1)
    assert caught.value.device == "cpu"
    assert caught.value.wanted_bytes > 0
    assert min(tried) <= BLOCK_ELEMENTS
    monkeypatch.delattr("os.fork")  # torch's threads of this process would not be there in a child
    assert main(["soup", *runs, "-o", str(tmp_path / "other"), "--device", "torch:cpu", "--quiet"]) == 1
    line, *more = capfd.readouterr().err.strip().splitlines()
    for word in ("device cpu", "B of its memory", "--device-budget", "--threads", "--device cpu"):
        assert word in line  # how many depends on whose tile is first
    assert len(more) <= 1, "only what is kept is said beside it"


def test_a_measurement_that_finds_no_memory_is_tried_again_once(tmp_path, runs, opened, monkeypatch):
    from streamsoup.backends import torch_tile

    lanes = opened()
    streamsoup.soup(runs[:2], tmp_path / "a.safetensors", method="slerp", parameters={"t": 0.5})
    real, failures = torch_tile.torch_measuring.gram, [torch.OutOfMemoryError("once")]

    def gram(*arguments):
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(torch_tile.torch_measuring, "gram", gram)
    options = {"method": "slerp", "parameters": {"t": 0.5}, "device": "torch:cpu", "workers": 1}
    streamsoup.soup(runs[:2], tmp_path / "b.safetensors", **options)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sum(x.released for x in lanes) == 1
    failures += [torch.OutOfMemoryError("twice")] * 2
    with pytest.raises(DeviceMemoryError, match="device cpu"):
        streamsoup.soup(runs[:2], tmp_path / "c.safetensors", **options)


# -- budgets and names ---------------------------------------------------------------------------------------------


def test_a_device_budget_too_small_is_refused_before_anything_is_made(tmp_path, runs):
    with pytest.raises(DeviceMemoryError, match=r"needed at least.*4 KiB may be used.*--device-budget") as caught:
        streamsoup.soup(runs, tmp_path / "soup", device="torch:cpu", device_budget_bytes="4KiB")
    assert list(tmp_path.iterdir()) == []
    words = str(caught.value).partition("--device-budget ")[2].partition(",")[0]
    streamsoup.soup(runs, tmp_path / "soup", device="torch:cpu", device_budget_bytes=words)


@pytest.mark.parametrize(
    "arguments",
    [["soup", "{0}", "{1}", "-o", "x"], ["greedy", "{0}", "{1}", "--score", "true", "-o", "x"],
     ["inspect", "--compare", "{0}", "{1}"], ["soup", "{0}", "{1}", "--dry-run"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_device_budget_without_a_device_is_refused(tmp_path, runs, monkeypatch, capfd, arguments):
    monkeypatch.chdir(tmp_path)
    assert main([*(word.format(*runs) for word in arguments), "--device-budget", "1GiB"]) == 1
    _, err = capfd.readouterr()
    assert "the device is the cpu" in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_plan_says_what_a_device_will_hold(runs, capfd):
    arguments = ["soup", *runs, "--dry-run", "--device", "torch:cpu,torch:cpu", "--device-budget", "8MiB"]
    assert main(arguments) == 0
    out, _ = capfd.readouterr()
    rows = [line for line in out.splitlines() if line.startswith("  device ")]
    assert len(rows) == 2
    assert "pieces of" in rows[0]
    assert "8 MiB allowed" in rows[0]
    assert main([*arguments, "--json"]) == 0
    devices = json.loads(capfd.readouterr().out)["devices"]
    assert [d["budget_bytes"] for d in devices] == [8 << 20] * 2
    assert all(0 < d["peak_bytes"] <= 8 << 20 and d["piece_elements"] % BLOCK_ELEMENTS == 0 for d in devices)


@pytest.mark.parametrize("command", ["greedy", "learn"])
def test_other_plans_say_it_too(runs, capfd, command):
    arguments = [command, *runs, "--dry-run", "--device", "torch:cpu", "--device-budget", "64MiB"]
    assert main(arguments) == 0
    assert "64 MiB allowed" in capfd.readouterr().out
    assert main([*arguments, "--json"]) == 0
    (share,) = json.loads(capfd.readouterr().out)["devices"]
    assert 0 < share["peak_bytes"] <= 64 << 20


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "'gpu' is neither"), ("cuda:0,tpu", "'tpu' is neither"), ("cpu,cuda:0", "Leave it out"),
     ("cuda:0,cuda:0", "twice"), ("", "neither"), ("cuda:0,", "'' is neither")],
)  # fmt: skip
def test_what_names_no_devices_is_refused(device, words):
    with pytest.raises(RecipeError, match=words):
        device_names(device)


def test_one_that_cannot_be_used_is_named():
    with pytest.raises(RecipeError, match="nonsense"):
        open_backend("torch:cpu,torch:nonsense")


def test_all_devices_are_those_of_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert device_names("all") == ("cuda:0", "cuda:1", "cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RecipeError, match="no CUDA device"):
        device_names("all")


def test_slots_are_dealt_to_devices_in_turn_and_both_do_tiles(runs, opened):
    lanes = opened()
    reference, _ = simmer(runs)
    found, _ = simmer(runs, device="torch:cpu,torch:cpu", workers=3, tile_blocks=1)
    assert same(found, reference)
    assert [len(x.host_bytes) for x in lanes] == [2 * (COUNT + 2), COUNT + 2]
    assert all(x.log for x in lanes)


def test_means_of_devices():
    one = choose_means("cuda:0", "map", None, tensor_bytes=1e6)
    assert (one["workers"], one["readers"], one["staged"], one["locked"]) == (4, 8, True, True)
    two = choose_means("cuda:0,cuda:1", "ahead", None, tensor_bytes=1e6)
    assert (two["workers"], two["readers"], two["ahead"]) == (8, 16, True)
    assert choose_means("cuda:0,cuda:1", "map", 1, tensor_bytes=1e6)["workers"] == 2
    cpu = choose_means("cpu", "map", 3, tensor_bytes=1e6)
    assert cpu == {"workers": 3, "readers": READERS, "staged": False, "locked": False, "ahead": False}


@pytest.mark.parametrize("method", ["karcher", "model_stock", "geometric_median", "multislerp"])
def test_what_was_looked_at_is_not_taken_for_another_piece(tmp_path, monkeypatch, method):
    """A tensor in one tile that goes through the device in pieces: the last one looked at is not the first combined."""
    shapes = {"w": (30 * BLOCK_ELEMENTS - 7,)}
    paths = [str(write_checkpoint(tmp_path / f"run{i}", realistic(i, shapes, "F32"))) for i in range(4)]
    options = {"method": method, "workers": 1, **({"base": paths[3]} if method == "model_stock" else {})}
    streamsoup.soup(paths[:3], tmp_path / "cpu", **options)
    real = share_device
    for blocks in (8, 15, 16, 24, 32):

        def share(*given, blocks=blocks, **named):
            return dataclasses.replace(real(*given, **named), piece_elements=blocks * BLOCK_ELEMENTS)

        monkeypatch.setattr(cuda, "share_device", share)
        streamsoup.soup(paths[:3], tmp_path / str(blocks), device="torch:cpu", **options)
        assert weights_bytes(tmp_path / str(blocks)) == weights_bytes(tmp_path / "cpu"), blocks
