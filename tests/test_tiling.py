"""Tiles against the budget: never over it, and refused only with the least that would do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsoup.errors import BudgetError
from streamsoup.methods.protocol import TensorInfo
from streamsoup.tiling import BLOCK_ELEMENTS, MIB, TileNeeds, choose_tiling, row_unit, slot_bytes

needs = st.builds(
    TileNeeds,
    ingredients=st.integers(1, 2000),
    in_itemsize=st.sampled_from([1, 2, 4, 8]),
    out_itemsize=st.sampled_from([1, 2, 4, 8]),
    staged=st.booleans(),
    largest_elements=st.integers(0, 2**40),
    ahead=st.booleans(),
    groupable=st.booleans(),
)


@given(needs=needs, budget=st.integers(1, 2**36), workers=st.integers(1, 128))
def test_projected_memory_never_exceeds_the_budget_and_a_refusal_names_what_does(needs, budget, workers):
    least = 0
    try:
        tiling = choose_tiling(needs, budget_bytes=budget, workers=workers)
    except BudgetError as error:
        least = error.least_bytes
    if least:
        assert least > budget
        tiling = choose_tiling(needs, budget_bytes=least, workers=workers)
        budget = least
        with pytest.raises(BudgetError):
            choose_tiling(needs, budget_bytes=least - 1 - MIB, workers=workers)
    assert tiling.peak_bytes <= budget
    assert 1 <= tiling.workers <= workers
    assert 1 <= tiling.group <= needs.ingredients
    assert needs.groupable or tiling.group == needs.ingredients
    assert tiling.tile_elements % BLOCK_ELEMENTS == 0
    assert tiling.tile_elements >= BLOCK_ELEMENTS
    assert tiling.slot_bytes == slot_bytes(needs, tiling.tile_elements, tiling.group)


@given(needs=needs, budget=st.integers(1, 2**34), workers=st.integers(1, 64))
def test_a_larger_budget_is_never_refused_where_a_smaller_one_does(needs, budget, workers):
    try:
        choose_tiling(needs, budget_bytes=budget, workers=workers)
    except BudgetError:
        return
    choose_tiling(needs, budget_bytes=2 * budget, workers=workers)


def test_the_message_names_budget_and_least_in_words_that_work():
    from streamsoup.units import parse_bytes

    needs = TileNeeds(8, 2, 2, True, 10**9)
    with pytest.raises(BudgetError, match=r"1 MiB is too small.*--budget") as caught:
        choose_tiling(needs, budget_bytes=MIB, workers=2)
    words = str(caught.value).rpartition("--budget ")[2].rstrip(".")
    assert parse_bytes(words) >= caught.value.least_bytes
    choose_tiling(needs, budget_bytes=parse_bytes(words), workers=2)


def test_when_n_tiles_do_not_fit_tiles_shrink_first_and_groups_come_last():
    needs = TileNeeds(512, 2, 2, True, 10**9)
    sizes = [choose_tiling(needs, budget_bytes=b * MIB, workers=2) for b in (4096, 512, 128, 48, 24, 16)]
    assert [t.tile_elements * t.group for t in sizes] == sorted(
        (t.tile_elements * t.group for t in sizes), reverse=True
    )
    assert sizes[0].group == needs.ingredients
    assert sizes[-1].group < needs.ingredients


def test_tiles_are_no_larger_than_the_largest_tensor():
    tiling = choose_tiling(TileNeeds(2, 2, 2, True, 5000), budget_bytes=2**33, workers=2)
    assert tiling.tile_elements == 3 * BLOCK_ELEMENTS


@given(ingredients=st.integers(1, 5000))
def test_mapped_ingredients_cost_nothing_each(ingredients):
    one = TileNeeds(1, 2, 2, False, 10**9)
    many = TileNeeds(ingredients, 2, 2, False, 10**9)
    budget = 64 * MIB
    first, second = (choose_tiling(n, budget_bytes=budget, workers=2).peak_bytes for n in (one, many))
    assert first == second


def test_rows_and_blocks_end_together_or_with_the_tensor():
    assert row_unit(TensorInfo("w", (1000, 1664))) == 16 * 1664
    assert row_unit(TensorInfo("w", (1000, 7))) == 4 * 2048  # all of it
    assert row_unit(TensorInfo("w", (1, 257, 1664))) == 209 * 2048
    assert row_unit(TensorInfo("b", (5000,))) == 3 * 2048
    assert row_unit(TensorInfo("s", ())) == 2048
