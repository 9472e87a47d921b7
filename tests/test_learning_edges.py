"""Learned soups at the edges: what was wrong once."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import test_learning_crashes as crashes
import torch
from factory import read_checkpoint, same_bits, weights_bytes
from learning_pools import Dropping, Net, Statistics, as_array, make_batches, stored_states, write_states
from test_learning_crashes import at, bench, one_thread, server  # noqa: F401
from torch import nn
from torch.nn.functional import cross_entropy

import streamsoup
from streamsoup.errors import BudgetError, DestinationError, MismatchError, NonFiniteError, RecipeError, StreamsoupError


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def paths(tmp_path, module):
    return write_states(tmp_path / "runs", stored_states(module, 3))


def learn(paths, module, out=None, **options):
    return streamsoup.learn(paths, module, cross_entropy, make_batches(3), out, **{"epochs": 1, **options})


# -- resuming ------------------------------------------------------------------------------------------------------


def test_a_temperature_and_a_step_count_are_read_back(tmp_path):
    """numpy.ascontiguousarray makes a scalar an array of one: no job with a temperature could go on."""
    job = crashes.interrupted(tmp_path, steps=2)
    _, result = crashes.learn(job)
    assert len(result.steps) == 12


def test_killed_between_publishing_and_learned_json_it_goes_on(tmp_path, bench):  # noqa: F811
    """The soup is in its place, learned.json is not: the same call must end well, not say that it exists already."""
    job = bench.job(tmp_path, "adam")
    assert bench.server({**job, **at("cook", 1)})["code"] == -signal.SIGKILL
    assert (tmp_path / "soup").exists()
    answer = bench.server(job)
    assert answer["code"] == 0, answer["errors"]
    assert (tmp_path / "soup" / "learned.json").exists()
    assert weights_bytes(tmp_path / "soup") == bench.uninterrupted("adam")[1]


def test_an_option_that_was_refused_does_not_block_the_work_folder(paths, module, tmp_path):
    for wrong in ({"parametrisation": "sofmax"}, {"optimizer": "adamm"}, {"init": [0.5, 0.5, 0.0]}):
        with pytest.raises(RecipeError) as caught:
            learn(paths, module, workdir=tmp_path / "work", **wrong)
        assert not getattr(caught.value, "__notes__", ()), "nothing was learned that could be kept"
        learn(paths, module, workdir=tmp_path / "work")
        for file in (tmp_path / "work").iterdir():
            file.unlink()


def test_a_soup_is_not_sent_into_its_own_work_folder(paths, module, tmp_path):
    """It is noticed after all was learned, or when it is to go on: say so at the beginning."""
    for out, work in ((tmp_path / "x", tmp_path / "x"), (tmp_path / "work" / "soup", tmp_path / "work")):
        steps = []
        with pytest.raises(StreamsoupError):
            learn(paths, module, out, workdir=work, on_step=steps.append)
        assert not steps


@pytest.mark.parametrize("how", ["rng", "resume"])
def test_held_out_batches_in_train_mode_are_of_the_seed_alone(tmp_path, how):
    """`evaluate` draws the user's random numbers: they change, and what is learned depends on them."""
    torch.manual_seed(0)
    module = Dropping().double().train()
    paths = write_states(tmp_path, stored_states(module, 3))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        result = learn(paths, module, held_out=make_batches(2, seed=5), epochs=3)
        if how == "rng":
            assert torch.equal(torch.get_rng_state(), before)
        found.append([s.held_out for s in result.steps if s.held_out is not None])
    assert found[0] == found[1]


# -- numbers -------------------------------------------------------------------------------------------------------


def test_a_held_out_loss_that_is_no_number_is_refused(paths, module):
    """`loss < best` is false for NaN: at the beginning it is "best" for ever, later it passes in silence."""

    def loss_fn(logits, targets):
        loss = cross_entropy(logits, targets)
        return loss if torch.is_grad_enabled() else loss * float("nan")

    with pytest.raises(NonFiniteError, match="held-out"):
        streamsoup.learn(paths, module, loss_fn, make_batches(3), held_out=make_batches(1), epochs=1)


@pytest.mark.parametrize("held_out", [None, 1])
def test_in_train_mode_the_module_ends_as_the_soup(tmp_path, held_out):
    """A forward pass counts batches and moves statistics: they are to be those of the soup at the end."""
    torch.manual_seed(0)
    module = Statistics().double().train()
    paths = write_states(tmp_path, stored_states(module, 3))
    learn(paths, module, tmp_path / "soup", held_out=held_out and make_batches(1))
    stored = read_checkpoint(tmp_path / "soup")
    found = {n: as_array(t) for n, t in module.state_dict().items()}
    differing = [n for n in stored if stored[n].tobytes() != found[n].tobytes()]
    assert not differing
    assert same_bits(stored, found)


def test_a_tiny_coefficient_of_a_float64_soup_can_be_published(tmp_path, module):
    """A softmax may go below 2^-400, which `soup` refuses for float64: such a coefficient is zero."""
    paths = write_states(tmp_path, stored_states(module, 3))
    result = learn(paths, module, tmp_path / "soup", lr=80.0, epochs=1)
    smallest = result.coefficients[result.coefficients > 0].min()
    assert (result.coefficients == 0).any()
    assert smallest >= 2.0**-400
    assert (tmp_path / "soup").exists()


def test_unequal_values_of_a_tied_parameter_are_refused(tmp_path):
    """Two stored tensors go into one parameter: which one it holds depends on which thread comes last."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(6, 6, bias=False)
            self.leave = nn.Linear(6, 6, bias=False)
            self.leave.weight = self.enter.weight

        def forward(self, x):
            return self.leave(torch.tanh(self.enter(x)))

    module = Tied().double()
    states = stored_states(module, 3)
    assert not torch.equal(states[0]["enter.weight"], states[0]["leave.weight"])
    paths = write_states(tmp_path, states)
    with pytest.raises(MismatchError, match=r"leave\.weight"):
        learn(paths, module)


def test_sparse_gradients_are_taken_or_refused_in_our_words(tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 6, sparse=True)
            self.leave = nn.Linear(6, 4)

        def forward(self, x):
            return self.leave(self.words(x).mean(1))

    module = Bag().double()
    paths = write_states(tmp_path, stored_states(module, 3))
    batches = [(torch.randint(0, 10, (8, 3)), torch.randint(0, 4, (8,))) for _ in range(2)]
    sparse = streamsoup.learn(paths, module, cross_entropy, batches, epochs=1)
    module.words.sparse = False
    dense = streamsoup.learn(paths, module, cross_entropy, batches, epochs=1)
    np.testing.assert_allclose(sparse.coefficients, dense.coefficients, rtol=1e-12)


# -- budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_mode", ["map", "plain"])
def test_the_least_budget_that_is_named_is_enough(paths, module, read_mode):
    """Half of the budget is reserved: the least that is named, counted with the half of one byte, is too small."""
    with pytest.raises(BudgetError) as caught:
        learn(paths, module, budget_bytes=1, read_mode=read_mode)
    learn(paths, module, budget_bytes=caught.value.least_bytes, read_mode=read_mode)


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1}, {"seed": 0.5}, {"weight_decay": -0.1}, {"weight_decay": float("nan")}, {"lr": float("inf")},
        {"epochs": 1.5}, {"accumulate": 1.5}, {"by": ["others"]}, {"by": ["*", "*"]}, {"patience": 2},
    ],
    ids=str,
)  # fmt: skip
def test_other_options_that_make_no_sense_are_refused(paths, module, options):
    with pytest.raises(RecipeError):
        learn(paths, module, **options)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_weights_to_begin_with_may_be_an_array(paths, module, kind):
    weights = [0.2, 0.3, 0.5]
    given = np.array(weights) if kind == "numpy" else torch.tensor(weights, dtype=torch.float64)
    assert np.array_equal(
        learn(paths, module, init=given).coefficients, learn(paths, module, init=weights).coefficients
    )


def test_a_loss_that_is_no_scalar_is_told_of(paths, module):
    def loss_fn(logits, targets):
        return cross_entropy(logits, targets, reduction="none")

    with pytest.raises(StreamsoupError, match="scalar"):
        streamsoup.learn(paths, module, loss_fn, make_batches(2))


def test_a_loss_without_a_gradient_is_told_of(paths, module):
    with pytest.raises(StreamsoupError, match="gradient"):
        streamsoup.learn(paths, module, lambda z, y: cross_entropy(z.detach(), y), make_batches(2), temperature=False)


def test_it_learns_where_gradients_are_switched_off(paths, module):
    with torch.no_grad():
        result = learn(paths, module)
    assert len(result.steps) == 3


def test_nothing_is_written_after_the_data_changed_at_the_last_moment(paths, module, tmp_path):
    """Between the last step and publishing, and with the time put back: the digests of both are known."""
    import os

    file = Path(paths[1]) / "model.safetensors"

    def change(record):
        if record.step == 3:
            stat = file.stat()
            with file.open("r+b") as opened:
                opened.seek(-2, 2)
                opened.write(b"\x11")
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises((StreamsoupError, DestinationError)):
        learn(paths, module, tmp_path / "soup", on_step=change, read_mode="plain")
    assert not (tmp_path / "soup").exists()


def test_ingredients_may_have_their_tensors_in_another_order(tmp_path, module):
    states = stored_states(module, 3)
    paths = write_states(tmp_path / "runs", states)
    mixed = write_states(tmp_path / "mixed", [dict(reversed(s.items())) if i else s for i, s in enumerate(states)])
    first = learn(paths, module, tmp_path / "one", by="layer")
    second = learn(mixed, module, tmp_path / "two", by="layer")
    assert first.coefficients.tobytes() == second.coefficients.tobytes()
    assert weights_bytes(tmp_path / "one") == weights_bytes(tmp_path / "two")
