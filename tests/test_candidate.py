"""A candidate streams itself into a live module, a mapping or files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import read_checkpoint, write_checkpoint

import streamsoup
from streamsoup.errors import MismatchError
from streamsoup.sinks import Nowhere


class Tied(torch.nn.Module):
    """Two names for one tensor, a buffer, a float16 layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(6, 4, bias=False)
        self.head = torch.nn.Linear(6, 4, bias=False)
        self.head.weight = self.embed.weight
        self.low = torch.nn.Linear(4, 3).half()
        self.register_buffer("steps", torch.tensor([7, 8, 9]))


@pytest.fixture
def running(tmp_path):
    rng = np.random.default_rng(0)
    runs = []
    for i in range(3):
        tensors = {
            "embed.weight": rng.standard_normal((4, 6)).astype(np.float32),
            "low.weight": rng.standard_normal((3, 4)).astype(np.float16),
            "low.bias": rng.standard_normal(3).astype(np.float16),
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
        lambda m: setattr(m, "low", torch.nn.Linear(5, 3).half()),
        lambda m: setattr(m, "extra", torch.nn.Linear(2, 2)),
        lambda m: delattr(m, "low"),
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
    del module.low
    module.extra = torch.nn.Linear(2, 2)
    running.mean().load_into(module, strict=False)
    assert torch.equal(module.embed.weight, running.mean().tensors()["embed.weight"])


def test_writing_again_reuses_the_files(running, tmp_path):
    running.candidate(running.pool.paths[2]).write(tmp_path / "out")
    first = {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    running.mean().write(tmp_path / "out")
    assert first == {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}


# -- into modules --------------------------------------------------------------------------------------------------


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_modules_dtypes_are_kept_whatever_the_soups_are(running):
    module = Tied().to(torch.float64)
    half = module.low.to(torch.bfloat16)
    running.mean().load_into(module)
    tensors = running.mean().tensors()
    assert module.embed.weight.dtype == torch.float64
    assert torch.equal(module.embed.weight, tensors["embed.weight"].double())
    assert torch.equal(half.weight, tensors["low.weight"].bfloat16())
    assert module.steps.dtype == torch.int64
    assert module.steps.tolist() == [1, 2, 3]
    assert all(p.requires_grad for p in module.parameters())


def test_a_module_in_training_gets_no_gradients_from_loading(running):
    module = Tied()
    loss = module.embed(torch.ones(6)).sum()
    loss.backward()
    gradient = module.embed.weight.grad.clone()
    running.mean().load_into(module)
    assert torch.equal(module.embed.weight.grad, gradient)
    assert module.embed.weight.is_leaf
    assert module.embed.weight.grad_fn is None


def test_loading_again_and_again_leaves_nothing_of_the_last(running):
    module = Tied()
    running.candidate(running.pool.paths[2]).load_into(module)
    running.mean().load_into(module)
    fresh = Tied()
    running.mean().load_into(fresh)
    assert all(torch.equal(tensor, state(fresh)[name]) for name, tensor in state(module).items())


def test_both_names_of_a_tied_tensor_may_be_in_the_soup(tmp_path):
    weight = np.ones((4, 6), np.float32)
    tensors = {
        "embed.weight": weight,
        "head.weight": weight,
        "low.weight": np.ones((3, 4), np.float16),
        "low.bias": np.ones(3, np.float16),
        "steps": np.arange(3),
    }
    run = str(write_checkpoint(tmp_path / "run", tensors))
    module = Tied()
    streamsoup.RunningSoup(run, budget_bytes=1 << 27).add(run).mean().load_into(module)
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.embed.weight, torch.ones(4, 6))


def test_shapes_are_checked_even_when_names_may_be_left_out(running):
    module = Tied()
    module.low = torch.nn.Linear(5, 3).half()
    before = state(module)
    with pytest.raises(MismatchError, match=r"low\.weight"):
        running.mean().load_into(module, strict=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(module).items())


def test_tensors_that_are_not_contiguous_are_refused_and_unchanged(running):
    module = Tied()
    module.embed.weight = module.head.weight = torch.nn.Parameter(torch.randn(6, 4).t())
    before = state(module)
    with pytest.raises(MismatchError, match=r"embed\.weight: is not contiguous"):
        running.mean().load_into(module)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(module).items())


def test_every_problem_is_named(running):
    module = Tied()
    del module.low
    module.extra = torch.nn.Linear(2, 2)
    with pytest.raises(MismatchError) as caught:
        running.mean().load_into(module)
    for name in ("low.weight", "low.bias", "extra.weight", "extra.bias"):
        assert name in str(caught.value)


def test_state_that_is_no_tensor_is_left_alone(running):
    class Extra(Tied):
        def get_extra_state(self):
            return {"step": 3}

        def set_extra_state(self, state):
            raise AssertionError("was set")

    module = Extra()
    with contextlib.suppress(MismatchError):  # strict may refuse it, in our words
        running.mean().load_into(module)
    running.mean().load_into(module, strict=False)
    assert torch.equal(module.embed.weight, running.mean().tensors()["embed.weight"])


def test_a_module_without_memory_is_refused(running):
    with torch.device("meta"):
        module = Tied()
    with pytest.raises(MismatchError, match="meta"):
        running.mean().load_into(module)


# -- as a mapping --------------------------------------------------------------------------------------------------


def test_a_lookup_reads_that_tensor_of_the_operands_and_no_other(running):
    tensors = running.candidate(running.pool.paths[2]).tensors()
    table = running.pool.first.table
    before = running.bytes_read
    tensors["low.bias"]
    position = list(table.names).index("low.bias")
    one = int(table.nbytes[position]) + int(table.elements[position]) * running.pool.sum_dtype.itemsize
    assert running.bytes_read - before == one


def test_what_a_mapping_reads_is_counted(running):
    candidate = running.candidate(running.pool.paths[2])
    before = running.bytes_read
    for tensor in candidate.tensors().values():
        assert tensor.numel()
    looked_up = running.bytes_read - before
    candidate.stream(Nowhere())
    assert looked_up == running.bytes_read - before - looked_up > 0


def test_empty_tensors_can_be_looked_up(tmp_path):
    tensors = {"none": np.zeros((0, 5), np.float32), "no ids": np.zeros(0, np.int64), "w": np.ones(3, np.float32)}
    runs = [str(write_checkpoint(tmp_path / f"run{i}", tensors)) for i in range(2)]
    found = streamsoup.RunningSoup(runs, budget_bytes=1 << 27).add(runs[0]).add(runs[1]).mean().tensors()
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"none": (0, 5), "no ids": (0,), "w": (3,)}


def test_tensors_looked_up_are_the_readers_own(running):
    tensors = running.mean().tensors()
    tensors["embed.weight"].zero_()
    assert tensors["embed.weight"].abs().sum() > 0


# -- as files ------------------------------------------------------------------------------------------------------


def sharded(folder, count=3, **options):
    tensors = [{f"t{j}": np.full((40, 10), i + j, np.float32) for j in range(4)} for i in range(count)]
    companions = {"config.json": '{"model_type": "toy"}', "tokenizer.json": "{}"}
    return [
        str(write_checkpoint(folder / f"run{i}", t, companions=companions, **options)) for i, t in enumerate(tensors)
    ]


def test_a_written_candidate_is_a_complete_checkpoint(tmp_path):
    runs = sharded(tmp_path / "runs", shards=2)
    running = streamsoup.RunningSoup(runs, budget_bytes=1 << 27, shard_bytes=3500).add(runs[0])
    path = running.candidate(runs[1]).write(tmp_path / "out")
    assert path == tmp_path / "out"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in path.glob("*.safetensors")}
    assert {"config.json", "tokenizer.json"} <= {p.name for p in path.iterdir()}
    streamsoup.soup(runs[:2], tmp_path / "soup", shard_size=3500)
    for file in path.glob("*.safetensors*"):
        assert file.read_bytes() == (tmp_path / "soup" / file.name).read_bytes()


def test_candidates_of_single_files_are_single_files(tmp_path):
    runs = [str(write_checkpoint(tmp_path / f"run{i}.safetensors", {"w": np.full(5, i, np.float32)})) for i in range(2)]
    candidate = streamsoup.RunningSoup(runs, budget_bytes=1 << 27).add(runs[0]).candidate(runs[1])
    path = candidate.write(tmp_path / "out")
    assert path.is_file()
    assert path == candidate.path
    assert read_checkpoint(path)["w"].tolist() == [0.5] * 5


@pytest.mark.parametrize("left", ["nothing but the folder", "half a set", "no header", "too long", "another layout"])
def test_what_an_earlier_process_left_is_made_whole(tmp_path, left):
    """A process may die anywhere while it writes the first candidate, or another job may have used the folder."""
    runs = sharded(tmp_path / "runs", shards=2)
    running = streamsoup.RunningSoup(runs, budget_bytes=1 << 27, shard_bytes=3500).add(runs[0])
    whole = running.candidate(runs[1]).write(tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".streamsoup-candidate").touch()  # comes first
    first = sorted(whole.glob("*.safetensors"))[0]
    if left == "half a set":
        (out / first.name).write_bytes(first.read_bytes()[:100])
    elif left == "no header":
        (out / first.name).write_bytes(bytes(first.stat().st_size))
    elif left == "too long":
        (out / first.name).write_bytes(first.read_bytes() + b"more")
    elif left == "another layout":
        streamsoup.RunningSoup(runs, budget_bytes=1 << 27).add(runs[2]).mean().write(out)
        assert (out / "model.safetensors").exists()
    running.candidate(runs[1]).write(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_folder_with_files_that_are_no_candidates_is_refused(tmp_path):
    runs = sharded(tmp_path / "runs", shards=2)
    running = streamsoup.RunningSoup(runs, budget_bytes=1 << 27).add(runs[0])
    before = {p.name: p.read_bytes() for p in Path(runs[1]).iterdir()}
    with pytest.raises(streamsoup.StreamsoupError, match=r"no candidate's.*new folder"):
        running.candidate(runs[1]).write(runs[1])
    assert {p.name: p.read_bytes() for p in Path(runs[1]).iterdir()} == before


def test_writing_allocates_nothing_the_second_time(running, tmp_path, monkeypatch):
    running.mean().write(tmp_path / "out")
    monkeypatch.setattr("os.posix_fallocate", lambda *_: pytest.fail("allocated again"))
    running.candidate(running.pool.paths[2]).write(tmp_path / "out")
