"""Reading the kept few again: only where it is cheaper, never a third time, and whatever a process did before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamsoup.reread import MOST_READS, ReadPlanner

NBYTES = {str(i): 10 for i in range(30)}


def play(accepted, sum_bytes=40):
    """A greedy run in small; returns the choices and the planner."""
    planner, kept, choices = ReadPlanner(NBYTES, sum_bytes), ["0"], []
    for number, accept in enumerate(accepted, 1):
        choices.append(planner.reread(kept, str(number)))
        if accept:
            kept.append(str(number))
    return choices, planner, kept


@given(accepted=st.lists(st.booleans(), min_size=1, max_size=20), sum_bytes=st.integers(0, 1000))
def test_whatever_is_accepted_nothing_is_read_a_third_time(accepted, sum_bytes):
    _, planner, kept = play(accepted, sum_bytes)
    # The soup at the end: what the sum lacks is read once more.
    last = {path: planner.reads[path] + (path not in planner._summed) for path in kept}
    assert max(last.values()) <= MOST_READS
    assert max(planner.reads.values()) <= MOST_READS


@given(accepted=st.lists(st.booleans(), min_size=2, max_size=20))
def test_a_run_that_goes_on_chooses_what_it_chose(accepted):
    whole, _, _ = play(accepted)
    part, _, _ = play(accepted[:-1])
    assert whole[:-1] == part


def test_the_first_trial_reads_both_and_builds_no_sum_and_a_sum_that_is_there_is_used():
    assert play([False, False, True, False])[0] == [True, False, False, False]


def test_a_sum_of_nothing_is_not_cheaper_to_avoid():
    assert not ReadPlanner({"a": 10, "b": 10}, 0).reread(["a"], "b")


def test_where_only_the_sum_will_do_it_is_used():
    assert not ReadPlanner(NBYTES, 40).reread(["0"], "1", may_reread=False)


def test_what_is_dropped_makes_the_sum_be_built_anew():
    planner = ReadPlanner(NBYTES, 40)
    planner.reread(["0", "1", "2"], "2", may_reread=False)
    assert planner.reads == {"0": 1, "1": 1, "2": 2}
    planner.reread(["0", "2"], "1")
    assert planner.reads == {"0": 2, "1": 2, "2": 3}
