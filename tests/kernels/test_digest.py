import numpy as np
import pytest
import torch
from exact import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsoup.kernels import combine as compiled
from streamsoup.kernels import torch_combine
from streamsoup.kernels.codes import BLOCK

M64 = (1 << 64) - 1


def mix(value):
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & M64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & M64
    return value ^ value >> 31


def by_definition(raw: bytes, itemsize, first_block):
    total, step = 0, BLOCK * itemsize
    for number, at in enumerate(range(0, len(raw), step)):
        part = raw[at : at + step]
        part += b"\0" * (-len(part) % 8)
        words = [int.from_bytes(part[i : i + 8], "little") for i in range(0, len(part), 8)]
        s1 = s2 = 0
        for j, word in enumerate(words):
            a = word + (j + 1) * 0x9E3779B97F4A7C15 & M64
            s1, s2 = s1 + (a & 0xFFFFFFFF) * (a >> 32) & M64, s2 + word & M64
        block = first_block + number
        total += mix(s1 ^ mix(s2 + (block + 1) * 0xBF58476D1CE4E5B9 & M64))
    return total & M64


def digest(backend, raw: bytes, itemsize=2, first_block=0):
    array = np.frombuffer(raw, np.uint8).copy()
    if backend == "torch":
        return int(torch_combine.digest(torch.from_numpy(array), itemsize, first_block)) & M64
    return compiled.digest(array.ctypes.data, len(raw), itemsize, first_block)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    nbytes=st.one_of(st.integers(0, 200), st.integers(4000, 10000)),
    itemsize=st.sampled_from([1, 2, 4, 8, 16]),
    first_block=st.integers(0, 2**45),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_digest_is_what_its_definition_says(backend, seed, nbytes, itemsize, first_block):
    raw = np.random.default_rng(seed).bytes(nbytes)
    assert digest(backend, raw, itemsize, first_block) == by_definition(raw, itemsize, first_block)


def test_every_single_bit_is_noticed():
    for raw in (np.random.default_rng(0).bytes(203), bytes(203), b"\xff" * 203):
        before = digest("numba", raw)
        changed = set()
        for bit in range(8 * len(raw)):
            other = bytearray(raw)
            other[bit // 8] ^= 1 << bit % 8
            changed.add(digest("numba", bytes(other)))
        assert before not in changed
        assert len(changed) == 8 * len(raw)


def test_swapped_words_and_blocks_are_noticed():
    raw = np.random.default_rng(1).bytes(3 * 2 * BLOCK)
    words = np.frombuffer(raw, np.uint64)
    before = digest("numba", raw)
    for i, j in ((0, 1), (3, 19), (0, 511), (5, 700)):
        other = words.copy()
        other[[i, j]] = other[[j, i]]
        assert digest("numba", other.tobytes()) != before
    blocks = words.reshape(3, -1)
    assert digest("numba", blocks[[1, 0, 2]].tobytes()) != before


def test_read_sum_is_the_sum_of_the_words():
    raw = np.random.default_rng(2).bytes(10_001)
    array = np.frombuffer(raw, np.uint8).copy()
    words = np.frombuffer(raw[:10_000], np.uint64)
    assert compiled.read_sum(array.ctypes.data, len(raw)) == (int(words.sum()) + raw[-1]) & M64
