"""A candidate streams itself into a live module, a mapping or files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factory import read_checkpoint, write_checkpoint

import streamsoup
from streamsoup.errors import MismatchError


class Tied(torch.nn.Module):
    """Two names for one tensor, a buffer, a float16 layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(6, 4, bias=False)
        self.head = torch.nn.Linear(6, 4, bias=False)
        self.head.weight = self.embed.weight
        self.half = torch.nn.Linear(4, 3).half()
        self.register_buffer("steps", torch.tensor([7, 8, 9]))


@pytest.fixture
def running(tmp_path):
    rng = np.random.default_rng(0)
    runs = []
    for i in range(3):
        tensors = {
            "embed.weight": rng.standard_normal((4, 6)).astype(np.float32),
            "half.weight": rng.standard_normal((3, 4)).astype(np.float16),
            "half.bias": rng.standard_normal(3).astype(np.float16),
            "steps": np.array([1, 2, 3]),
        }
        runs.append(str(write_checkpoint(tmp_path / f"run{i}", tensors)))
    return streamsoup.RunningSoup(runs, budget_bytes=1 << 27).add(runs[0]).add(runs[1])


def test_a_module_gets_the_bits_of_the_files(running, tmp_path):
    module = Tied()
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    candidate = running.candidate(running.pool.paths[2])
    candidate.load_into(module)
    candidate.write(tmp_path / "out")
    for name, array in read_checkpoint(tmp_path / "out").items():
        assert torch.equal(module.state_dict()[name], torch.from_numpy(array.copy()))
    assert module.head.weight is module.embed.weight
    assert places == {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


def test_a_mapping_makes_tensors_when_they_are_looked_up(running, tmp_path):
    candidate = running.mean()
    tensors = candidate.tensors()
    read = running.bytes_read
    assert list(tensors) == list(running.pool.first.table.names)
    assert running.bytes_read == read
    candidate.write(tmp_path / "out")
    for name, array in read_checkpoint(tmp_path / "out").items():
        assert torch.equal(tensors[name], torch.from_numpy(array.copy()))
    with pytest.raises(KeyError):
        tensors["nothing"]


def test_a_module_that_does_not_fit_is_refused_and_unchanged(running):
    for change in (
        lambda m: setattr(m, "half", torch.nn.Linear(5, 3).half()),
        lambda m: setattr(m, "extra", torch.nn.Linear(2, 2)),
        lambda m: delattr(m, "half"),
        lambda m: setattr(m.embed, "weight", torch.nn.Parameter(torch.randn(6, 4).t())),
    ):
        module = Tied()
        change(module)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(MismatchError):
            running.mean().load_into(module)
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_names_of_one_side_may_be_left_out_when_asked(running):
    module = Tied()
    del module.half
    module.extra = torch.nn.Linear(2, 2)
    running.mean().load_into(module, strict=False)
    assert torch.equal(module.embed.weight, running.mean().tensors()["embed.weight"])


def test_writing_again_reuses_the_files(running, tmp_path):
    running.candidate(running.pool.paths[2]).write(tmp_path / "out")
    first = {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    running.mean().write(tmp_path / "out")
    assert first == {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
