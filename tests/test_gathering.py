"""Tensors in pieces: any rectangles and strides, any part of them, by any way of reading and in any strips."""

from __future__ import annotations

import contextlib
import itertools
import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamsoup import source as source_module
from streamsoup.checkpoints import Shard, gathering
from streamsoup.checkpoints.gathering import _boxes, is_contiguous, row_major
from streamsoup.checkpoints.pieces import Piece, Pieced, arrange
from streamsoup.dtypes import BY_NAME
from streamsoup.read import open_sources

ELEMENTS = 4096
MODES = ("map", "plain", "ahead")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A file of different 16-bit numbers, three bytes late."""
    path = tmp_path_factory.mktemp("stored") / "numbers"
    numbers = np.arange(ELEMENTS, dtype=np.uint16)
    path.write_bytes(b"abc" + numbers.tobytes())
    return path, numbers


@contextlib.contextmanager
def strips_of(nbytes):
    """Strips so short that little fits into one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_module, "STRIP_BYTES", nbytes)
        patch.setattr(gathering, "STRIP_BYTES", nbytes)
        patch.setattr(gathering, "_LITTLE_BYTES", 8)
        patch.setattr(source_module._strips, "free", [])
        yield


def checkpoint_of(path, tensors):
    stat = os.stat(path)
    shard = Shard(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, "")
    return arrange(tensors).checkpoint(str(path), None, (shard,), {})


def parts_of(checkpoint, mode, ranges):
    position = max(checkpoint.table.positions().get(name, -1) for name in ("t", "c"))
    with open_sources([checkpoint], mode) as (source,):
        found = []
        for start, stop in ranges:
            room = np.zeros((stop - start) * 2 + 16, np.uint8)  # the last bytes must stay as they are
            source.load(position, start * 2, (stop - start) * 2)
            source.fetch(position, start * 2, (stop - start) * 2, room.data)
            source.drop(position, start * 2, (stop - start) * 2)
            assert not room[-16:].any()
            found.append(room[:-16].view(np.uint16))
        return found


@st.composite
def strided(draw):
    """Shape, strides and a first element that fit the file."""
    sizes, strides, left = [], [], ELEMENTS - 1
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 9))
        stride = draw(st.integers(0, left // max(1, size - 1))) if size > 1 else draw(st.integers(0, 50))
        left -= (size - 1) * stride
        sizes.append(size)
        strides.append(stride)
    return tuple(sizes), tuple(strides), draw(st.integers(0, left))


@st.composite
def cuts_of(draw, count):
    places = sorted({0, count, *draw(st.lists(st.integers(0, count), max_size=4))})
    return list(itertools.pairwise(places))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), layout=strided(), mode=st.sampled_from(MODES), strip=st.sampled_from([8, 64]))
def test_strided_elements(stored, data, layout, mode, strip):
    path, numbers = stored
    shape, strides, first = layout
    wanted = np.lib.stride_tricks.as_strided(numbers[first:], shape, [2 * s for s in strides]).reshape(-1)
    piece = Piece(0, 3 + first * 2, (0,) * len(shape), shape, strides)
    apart = Pieced("apart", BY_NAME["I16"], (2,), [Piece(0, 3, (0,), (2,), (5,))])  # so that nothing is in place
    ranges = data.draw(cuts_of(math.prod(shape)))
    with strips_of(strip):
        checkpoint = checkpoint_of(path, [Pieced("t", BY_NAME["I16"], shape, [piece]), apart])
        found = parts_of(checkpoint, mode, ranges)
    assert np.array_equal(np.concatenate(found), wanted)


@st.composite
def rectangles(draw, shape):
    """Cut a shape across one dimension again and again."""
    parts = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        offsets, sizes = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, sizes[axis]))
        for low, size in ((0, at), (at, sizes[axis] - at)):
            moved = tuple(o + low if i == axis else o for i, o in enumerate(offsets))
            parts.append((moved, tuple(size if i == axis else s for i, s in enumerate(sizes))))
        parts = [p for p in parts if 0 not in p[1]]
    return draw(st.permutations(parts))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    mode=st.sampled_from(MODES),
    backwards=st.booleans(),
)
def test_rectangles(stored, data, shape, mode, backwards):
    """Each chunk in the file after the other; perhaps with its dimensions in the other order."""
    path, numbers = stored
    wanted, pieces, at = np.zeros(shape, np.uint16), [], 7
    for offsets, sizes in data.draw(rectangles(shape)):
        count = math.prod(sizes)
        strides = row_major(sizes[::-1])[::-1] if backwards else row_major(sizes)
        pieces.append(Piece(0, 3 + at * 2, offsets, sizes, strides))
        chunk = np.lib.stride_tricks.as_strided(numbers[at:], sizes, [2 * s for s in strides])
        wanted[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = chunk
        at += count
    checkpoint = checkpoint_of(path, [Pieced("t", BY_NAME["I16"], shape, pieces)])
    ranges = data.draw(cuts_of(wanted.size))
    if len(pieces) == 1 and is_contiguous(shape, pieces[0].strides):
        return
    with strips_of(16):
        found = parts_of(checkpoint, mode, ranges)
    assert np.array_equal(np.concatenate(found), wanted.reshape(-1))


@given(data=st.data(), shape=st.lists(st.integers(1, 6), max_size=4).map(tuple))
def test_boxes_are_the_range_in_order(data, shape):
    count = math.prod(shape)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    numbers = np.arange(count).reshape(shape)
    boxes = list(_boxes(shape, start, stop))
    found = [numbers[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].reshape(-1) for box in boxes]
    assert np.array_equal(np.concatenate(found), np.arange(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_few_bytes_are_read_of_elements_far_apart(tmp_path, monkeypatch):
    """A column of a large matrix is not all of the matrix."""
    path = tmp_path / "numbers"
    path.touch()
    os.truncate(path, 2 << 26)
    column = Pieced("c", BY_NAME["I16"], (64,), [Piece(0, 0, (0,), (64,), (1 << 20,))])
    read = []
    before = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        read.append(sum(map(len, buffers)))
        return before(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    parts_of(checkpoint_of(path, [column]), "plain", [(0, 64)])
    assert sum(read) <= 64 * 4096
