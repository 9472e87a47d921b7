"""Whether ingredients fit: every difference is a sentence with tensor, file, expected, found and what to do."""

from __future__ import annotations

import numpy as np
import pytest
from factory import realistic, write_checkpoint

from streamsoup.align import align, find_mismatches
from streamsoup.checkpoints import open_checkpoints
from streamsoup.errors import MismatchError

BASE = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32), "n": np.arange(3)}


def aligned(folder, *checkpoints, **options):
    paths = [str(write_checkpoint(folder / f"run{i + 1}", t, **options)) for i, t in enumerate(checkpoints)]
    return align(open_checkpoints(paths))


CASES = {
    "missing name": ({"a": BASE["a"], "n": BASE["n"]}, ["b", "run1", "missing from", "run2"]),
    "extra name": ({**BASE, "c": BASE["b"]}, ["c", "run2", "missing from", "run1"]),
    "shape": ({**BASE, "a": np.zeros((2, 4), np.float32)}, ["a: shape (2, 4)", "run2/model.safetensors", "(2, 3)"]),
    "same size, other shape": ({**BASE, "a": np.zeros((3, 2), np.float32)}, ["a: shape (3, 2)", "(2, 3)"]),
    "other rank": ({**BASE, "a": np.zeros(6, np.float32)}, ["a: shape (6,)", "(2, 3)"]),
    "scalar": ({**BASE, "b": np.array(1.0, np.float32)}, ["b: shape ()", "(4,)"]),
    "float against integer": ({**BASE, "n": np.zeros(3, np.float32)}, ["n: F32 in", "I64 in", "run1"]),
    "integer against float": ({**BASE, "b": np.zeros(4, np.int32)}, ["b: I32 in", "F32 in", "run1"]),
    "integers of other widths": ({**BASE, "n": np.arange(3, dtype=np.int32)}, ["n: I32 in", "I64 in"]),
    "bool against bytes": ({**BASE, "n": np.zeros(3, np.uint8)}, ["n: U8 in", "I64 in"]),
    "nothing in common": ({"z": np.zeros(1, np.float32)}, ["a (and 2 more)", "z:", "run1", "run2"]),
    "nothing": ({}, ["a (and 2 more)", "run2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_a_sentence_that_says_what_to_do(tmp_path, case):
    other, parts = CASES[case]
    with pytest.raises(MismatchError) as caught:
        aligned(tmp_path, BASE, other)
    for part in parts:
        assert part in str(caught.value)
    for problem in caught.value.problems:
        assert problem.endswith(".")
        assert "Leave" in problem
        assert "run2" in problem


def test_every_ingredient_that_does_not_fit_is_named_at_once(tmp_path):
    with pytest.raises(MismatchError) as caught:
        aligned(tmp_path, BASE, BASE, {"a": BASE["a"]}, {**BASE, "b": np.zeros(5, np.float32)})
    assert "run3" in str(caught.value)
    assert "run4" in str(caught.value)
    assert "run2" not in str(caught.value)


def test_thousands_of_differences_are_counted_and_not_all_printed(tmp_path):
    one = {f"w{i}": np.zeros(1, np.float32) for i in range(3000)}
    two = {f"w{i}": np.zeros(2, np.float32) for i in range(3000)}
    with pytest.raises(MismatchError) as caught:
        aligned(tmp_path, one, two)
    assert len(caught.value.problems) == 3000
    assert len(str(caught.value)) < 5000
    assert "2995 more" in str(caught.value)


@pytest.mark.parametrize("swap", [("F32", "F16"), ("F32", "F64"), ("BF16", "F32")])
def test_float_dtypes_may_differ(tmp_path, swap):
    alignment = aligned(tmp_path, *(realistic(0, {"a": (3,), "b": (2,)}, d) for d in swap))
    assert alignment.orders == (None, None)


def test_a_float_dtype_of_the_same_names_does_not_hide_an_integer(tmp_path):
    with pytest.raises(MismatchError, match="n: I32"):
        aligned(tmp_path, {"a": np.zeros(2, np.float32), "n": np.zeros(1, np.int64)},
                {"a": np.zeros(2, np.float16), "n": np.zeros(1, np.int32)})  # fmt: skip


def test_other_orders_and_shardings_are_matched_by_name(tmp_path):
    first = write_checkpoint(tmp_path / "run1", BASE)
    second = write_checkpoint(tmp_path / "run2", dict(reversed(BASE.items())), shards=3)
    one, two = open_checkpoints([str(first), str(second)])
    alignment = align([one, two])
    for tensor, name in enumerate(alignment.table.names):
        assert two.table.names[alignment.position(1, tensor)] == name
        assert one.table.names[alignment.position(0, tensor)] == name
    assert find_mismatches(one, two) == []
