"""Reading the kept few again: only where it is cheaper, and never a third time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamsoup.reread import MOST_READS, prefer_reread

KEPT = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 1000), min_size=1)
READS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 3))
NUMBER = st.integers(0, 10_000)


@given(kept=KEPT, reads=READS, sum_bytes=NUMBER)
def test_a_sum_that_is_ready_is_always_used(kept, reads, sum_bytes):
    assert not prefer_reread(kept, reads, sum_bytes=sum_bytes, sum_ready=True)


@given(kept=KEPT, reads=READS, sum_bytes=NUMBER)
def test_nothing_is_read_a_third_time_now_or_when_the_sum_is_built_later(kept, reads, sum_bytes):
    if prefer_reread(kept, reads, sum_bytes=sum_bytes, sum_ready=False):
        assert max(reads.get(path, 0) for path in kept) + 2 <= MOST_READS


@given(kept=KEPT, reads=READS, sum_bytes=NUMBER)
def test_it_is_chosen_only_where_fewer_bytes_move(kept, reads, sum_bytes):
    if prefer_reread(kept, reads, sum_bytes=sum_bytes, sum_ready=False):
        assert sum(kept.values()) < sum(kept.values()) + 2 * sum_bytes


@given(kept=KEPT, reads=READS, sum_bytes=NUMBER)
def test_more_reads_never_make_it_more_attractive(kept, reads, sum_bytes):
    def chosen(reads):
        return prefer_reread(kept, reads, sum_bytes=sum_bytes, sum_ready=False)

    assert chosen(reads) or not chosen({path: reads.get(path, 0) + 1 for path in kept})


def test_ingredients_that_were_tried_and_rejected_do_not_count():
    assert prefer_reread({"a": 10}, {"b": 9}, sum_bytes=40, sum_ready=False)


def test_a_sum_of_nothing_is_not_cheaper_to_avoid():
    assert not prefer_reread({"a": 10}, {}, sum_bytes=0, sum_ready=False)


@given(accepted=st.lists(st.booleans(), min_size=1, max_size=20))
def test_whatever_is_accepted_a_greedy_run_reads_nothing_a_third_time(accepted):
    """The loop in small: trials, lazily built sums, and the soup at the end."""
    reads, kept, summed = {}, ["0"], []

    def read(path):
        reads[path] = reads.get(path, 0) + 1

    def bring():
        if summed == kept:
            return
        for path in kept[-1:] if summed and summed == kept[:-1] else kept:
            read(path)
        summed[:] = kept

    for number, accept in enumerate(accepted, 1):
        sizes = dict.fromkeys(kept, 10)
        if prefer_reread(sizes, reads, sum_bytes=40, sum_ready=summed == kept):
            for path in kept:
                read(path)
        else:
            bring()
        read(str(number))
        if accept:
            kept.append(str(number))
    bring()
    assert max(reads.values()) <= MOST_READS
