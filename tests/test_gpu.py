"""What fake lanes cannot show: a real GPU has the CPU's bits, waits where it should, and holds what was projected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from device_pools import COUNT, budget_for, same, write_runs
from simmer import plan_for, simmer

from streamsoup.backends import open_backend
from streamsoup.backends.cuda import TorchBackend
from streamsoup.methods import linear
from streamsoup.tile_work import make_blend

pytestmark = pytest.mark.gpu
WEIGHTS = [0.3, 0.1, 0.25, 0.2, 0.15]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("blocks", [1, 2, 16])
@pytest.mark.parametrize("workers", [1, 4, 16])
def test_bits_in_pieces_and_groups(runs, group, blocks, workers):
    sizes = {"group": group, "workers": workers, "tile_blocks": 4}
    reference, expected = simmer(runs, WEIGHTS, **sizes)
    budget = budget_for(runs, blocks, **sizes)
    for _ in range(5):
        found, outcome = simmer(runs, WEIGHTS, device="cuda", device_budget_bytes=budget, **sizes)
        assert same(found, reference)
        np.testing.assert_array_equal(outcome.digests, expected.digests)


def test_every_device_of_all(runs):
    reference, _ = simmer(runs)
    found, _ = simmer(runs, device="all", workers=2 * torch.cuda.device_count(), tile_blocks=1)
    assert same(found, reference)


def one_slot(paths):
    plan = plan_for(paths, staged=True, locked=True, tile_blocks=64, workers=1)
    backend = open_backend("cuda")
    (share,) = backend.shares(plan.tiling, plan.needs)
    tensor = plan.table.names.index("b")
    return (
        backend.slot(plan.tiling, plan.needs),
        make_blend(plan, tensor, linear([1.0] * 5, normalize=True).numbers),
        share,
    )


def test_combining_never_has_the_host_wait(runs):
    slot, blend, _ = one_slot(runs)
    elements = 64 * 2048
    for index, size in enumerate(blend.itemsizes):
        slot.staging(index, elements * size)[:] = bytes(elements * size)
    slot.combine([0] * COUNT, blend, 0, elements, 0).result()  # tables, and kernels that are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        token = slot.combine([0] * COUNT, blend, 0, elements, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(token.result().output)


def test_buffers_are_page_locked_and_memory_is_what_was_projected(runs):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    slot, blend, share = one_slot(runs)
    assert all(buffer.is_pinned() for buffer in [*slot._staging, slot._output, slot._found_here])
    for first_block in range(20):
        slot.combine([0] * COUNT, blend, 0, 64 * 2048, first_block).result()
    assert torch.cuda.max_memory_allocated() - before <= share.peak_bytes + (1 << 20)


def test_real_lack_of_memory_halves_pieces(runs):
    reference, _ = simmer(runs, tile_blocks=64)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + (24 << 20)) / total)
    try:
        found, _ = simmer(runs, device="cuda", tile_blocks=64, workers=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert same(found, reference)


def test_the_default_budget_is_a_share_of_what_is_free():
    free, _ = torch.cuda.mem_get_info()
    plan_free = TorchBackend(["cuda"])._budgets[0]
    assert 0.25 * free <= plan_free <= 0.75 * free
