"""Learned soups against autograd with everything in memory, and against their own recipes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import read_checkpoint, same_bits, write_checkpoint
from learning_pools import (
    Dropping,
    Net,
    Recorder,
    Restartable,
    Statistics,
    as_array,
    as_tensors,
    groups_of,
    learn_in_memory,
    make_batches,
    stored_states,
    write_states,
)
from torch import nn
from torch.nn.functional import cross_entropy

import streamsoup
from streamsoup.recipe import recipe_to_yaml

PATTERNS = ("*.bias", "layers.*")
ALL_BY = ["model", "layer", "tensor", PATTERNS]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny networks are no work for several threads of torch, which only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_net(seed=0, dtype=torch.float64, **sizes):
    torch.manual_seed(seed)
    return Net(**sizes).to(dtype)


@pytest.fixture
def pool(tmp_path):
    """A float64 network, states of five fine-tunes, and their paths."""
    module = make_net()
    states = stored_states(module, 5)
    return module, states, write_states(tmp_path, states)


def in_names(result):
    """Coefficients by group."""
    return dict(zip(result.groups, result.coefficients, strict=True))


def assert_same_way(result, expected, *, tolerance=1e-9):
    """The whole trajectory: losses, temperatures, held-out losses, best step, coefficients."""
    close = {"rtol": tolerance, "atol": tolerance}
    assert len(result.steps) == len(expected.losses)
    np.testing.assert_allclose([s.loss for s in result.steps], expected.losses, **close)
    if expected.temperatures[0] is None:
        assert all(s.temperature is None for s in result.steps)
        assert result.temperature is None
    else:
        np.testing.assert_allclose([s.temperature for s in result.steps], expected.temperatures, **close)
        np.testing.assert_allclose(result.temperature, expected.temperature, **close)
    held_out = [s.held_out for s in result.steps if s.held_out is not None]
    np.testing.assert_allclose(held_out, expected.held_out[1:], **close)
    if expected.held_out:
        np.testing.assert_allclose(result.held_out, expected.best_loss, **close)
    else:
        assert result.held_out is None
    assert result.best_step == expected.best_step
    assert [s.step for s in result.steps] == list(range(1, len(expected.losses) + 1))
    np.testing.assert_allclose(result.coefficients, expected.coefficients, **close)
    assert result.coefficients.dtype == np.float64
    assert result.coefficients.shape == (len(expected.groups), len(result.ingredients))


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ALL_BY)
@pytest.mark.parametrize("parametrisation", ["softmax", "free"])
@pytest.mark.parametrize("temperature", [True, False])
def test_gradients_are_those_of_autograd(pool, by, parametrisation, temperature):
    module, states, paths = pool
    batches, init = make_batches(2), [1.0, 2.0, 3.0, 4.0, 5.0]
    seen = []
    result = streamsoup.learn(
        paths, module, cross_entropy, batches, by=by, init=init, parametrisation=parametrisation,
        temperature=temperature, accumulate=2, epochs=1, optimizer=lambda groups: Recorder(groups, seen),
    )  # fmt: skip
    start = np.array(init) / 15
    assert np.allclose(result.coefficients, start, atol=1e-15), "the recorder does not move"

    groups = groups_of(by, states[0])
    assert set(in_names(result)) == set(groups)
    rows = torch.tensor(start).repeat(len(groups), 1)
    raw = (rows.log() if parametrisation == "softmax" else rows).requires_grad_()
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    alpha = raw.softmax(1) if parametrisation == "softmax" else raw
    theta = {
        name: sum(alpha[row, i] * state[name] for i, state in enumerate(states))
        for row, names in enumerate(groups.values())
        for name in names
    }
    loss = sum(cross_entropy(torch.func.functional_call(module, theta, (x,)) * beta, y) for x, y in batches) / 2
    loss.backward()
    expected = raw.grad.numpy()
    if temperature:
        assert abs(seen[0] - float(beta.grad)) <= 1e-10 * abs(float(beta.grad))
    found = np.concatenate(seen[temperature:])
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()
    assert np.abs(expected).max() > 1e-3, "there is something to see"
    # Rows are small against the largest of all: each on its own scale too.
    assert (np.abs(found - expected).max(1) <= 1e-10 * np.abs(expected).max(1)).all()


def test_gradients_of_tensors_of_many_tiles_are_those_of_autograd(tmp_path):
    module = make_net(width=210)  # 44,100 elements: several tiles, and blocks that are not whole
    states = stored_states(module, 3, spread=0.02)
    paths = write_states(tmp_path, states, shards=2)
    batches, seen = make_batches(1), []
    result = streamsoup.learn(
        paths, module, cross_entropy, batches, by="tensor", parametrisation="free", temperature=False, epochs=1,
        optimizer=lambda groups: Recorder(groups, seen), budget_bytes="80MiB", workers=2,
    )  # fmt: skip
    assert set(result.groups) == set(states[0])
    mean = {n: (sum(s[n] for s in states) / 3).requires_grad_() for n in states[0]}
    cross_entropy(torch.func.functional_call(module, mean, (batches[0][0],)), batches[0][1]).backward()
    expected = np.array([[float((mean[n].grad * s[n]).sum()) for s in states] for n in result.groups])
    scale = np.array([[float((mean[n].grad * s[n]).abs().sum()) for s in states] for n in result.groups])
    assert (np.abs(np.concatenate(seen) - expected) <= 1e-12 * scale).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("live", [torch.float32, torch.float64])
def test_gradients_are_of_the_soup_as_it_is_stored(tmp_path, dtype, live):
    """The module is run at the rounded soup, and its gradient meets the ingredients unrounded."""
    module = make_net(dtype=live)
    states = stored_states(module, 4, dtype=dtype)
    paths = write_states(tmp_path, states)
    batches, seen = make_batches(1, dtype=live), []
    streamsoup.learn(
        paths, module, cross_entropy, batches, parametrisation="free", temperature=False, epochs=1,
        optimizer=lambda groups: Recorder(groups, seen),
    )  # fmt: skip
    soup = streamsoup.soup(paths, tmp_path / "mean", coefficients=[0.25] * 4).path
    stored = as_tensors(read_checkpoint(soup))
    theta = {n: t.to(live).requires_grad_() for n, t in stored.items()}
    loss = cross_entropy(torch.func.functional_call(module, theta, (batches[0][0],)), batches[0][1])
    loss.backward()
    expected = [sum(float((theta[n].grad.double() * s[n].double()).sum()) for n in theta) for s in states]
    np.testing.assert_allclose(seen[0], [expected], rtol=1e-10, atol=1e-10 * np.abs(expected).max())


# -- trajectories --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ALL_BY)
@pytest.mark.parametrize("parametrisation", ["softmax", "free"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_learning_goes_the_way_of_autograd_in_memory(pool, by, parametrisation, optimizer):
    module, states, paths = pool
    batches = make_batches(5)
    options = {
        "by": by, "parametrisation": parametrisation, "optimizer": optimizer,
        "lr": 0.05 if optimizer != "sgd" else 0.02, "weight_decay": 0.03,
    }  # fmt: skip
    expected = learn_in_memory(module, states, cross_entropy, [batches] * 3, **options)
    result = streamsoup.learn(paths, module, cross_entropy, Restartable(batches), epochs=3, **options)
    assert_same_way(result, expected)
    assert [s.epoch for s in result.steps] == [1] * 5 + [2] * 5 + [3] * 5
    start = 1 / len(states)
    assert np.abs(result.coefficients - start).max() > 1e-3, "something was learned"


@pytest.mark.parametrize("accumulate", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("temperature", [True, False])
def test_accumulated_batches_make_one_step(pool, accumulate, temperature):
    """Seven batches, so that the last step of an epoch has fewer: it is the mean over those it has."""
    module, states, paths = pool
    batches = make_batches(7)
    options = {"by": "layer", "accumulate": accumulate, "temperature": temperature}
    expected = learn_in_memory(module, states, cross_entropy, [batches] * 2, **options)
    result = streamsoup.learn(paths, module, cross_entropy, Restartable(batches), epochs=2, **options)
    assert_same_way(result, expected)


@pytest.mark.parametrize("lr", [0.05, 0.8])
@pytest.mark.parametrize("patience", [None, 1, 2])
def test_the_best_on_held_out_batches_is_kept(pool, lr, patience):
    """With the higher rate it gets worse soon: what was best is not the last, and patience ends it."""
    module, states, paths = pool
    batches, held_out = make_batches(4), make_batches(3, seed=7)
    options = {"lr": lr, "held_out": held_out, "patience": patience, "by": "tensor"}
    expected = learn_in_memory(module, states, cross_entropy, [batches] * 6, **options)
    result = streamsoup.learn(paths, module, cross_entropy, Restartable(batches), epochs=6, **options)
    assert_same_way(result, expected, tolerance=1e-7)
    if lr > 0.1:
        assert result.best_step < len(result.steps), "the test would show nothing otherwise"
    assert all((s.held_out is None) == (s.step % 4 != 0) for s in result.steps)
    # The module is at the best, not at the last.
    with torch.no_grad():
        beta = result.temperature
        loss = np.mean([float(cross_entropy(module(x) * beta, y)) for x, y in held_out])
    assert loss == result.held_out


def test_nothing_better_than_the_beginning_leaves_the_beginning(tmp_path):
    module = make_net()
    states = stored_states(module, 3)
    paths = write_states(tmp_path, states)
    batches = make_batches(3)
    # Held-out labels are the worst that the network can say of the training batches: learning makes them worse.
    uniform = {n: sum(s[n] for s in states) / 3 for n in states[0]}
    with torch.no_grad():
        held_out = [(x, torch.func.functional_call(module, uniform, (x,)).argmax(1)) for x, _ in batches]
        batches = [(x, torch.func.functional_call(module, uniform, (x,)).argmin(1)) for x, _ in batches]
    result = streamsoup.learn(
        paths, module, cross_entropy, batches, tmp_path / "soup", held_out=held_out, patience=2, epochs=9, lr=0.3
    )
    assert result.best_step == 0
    assert len(result.steps) == 6, "two evaluations in vain"
    assert result.temperature == 1.0
    assert np.allclose(result.coefficients, 1 / 3, atol=1e-15)
    assert same_bits(read_checkpoint(tmp_path / "soup"), {n: as_array(t) for n, t in module.state_dict().items()})


def test_patience_counts_again_after_progress(pool):
    """A held-out loss that is told: down, up, down, up, up."""
    module, _, paths = pool
    told = iter([5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 1.0])

    def loss_fn(logits, targets):
        loss = cross_entropy(logits, targets)
        return loss if torch.is_grad_enabled() else torch.tensor(next(told), dtype=torch.float64)

    result = streamsoup.learn(
        paths, module, loss_fn, make_batches(2), held_out=make_batches(1), patience=2, epochs=6, lr=0.01
    )
    assert [s.held_out for s in result.steps if s.held_out] == [4.0, 4.5, 3.0, 3.0, 3.5], "an equal loss is no progress"
    assert result.held_out == 3.0
    assert result.best_step == 6


@pytest.mark.parametrize("parametrisation", ["softmax", "free"])
def test_it_begins_from_weights(pool, parametrisation):
    module, states, paths = pool
    batches, weights = make_batches(3), [5.0, 1.0, 1.0, 2.0, 1.0]
    options = {"parametrisation": parametrisation, "by": "layer", "lr": 0.05}
    expected = learn_in_memory(module, states, cross_entropy, [batches] * 2, init=weights, **options)
    inits = [weights, tuple(weights), dict(zip(reversed(paths), reversed(weights), strict=True))]
    for init in inits:
        result = streamsoup.learn(paths, module, cross_entropy, Restartable(batches), epochs=2, init=init, **options)
        assert_same_way(result, expected)


def test_a_greedy_soup_is_polished(pool, tmp_path):
    module, states, paths = pool
    order = {path: i for i, path in enumerate(paths)}

    def score(candidate):  # likes 1 and 3, and 3 twice
        total = {m.path: m.weight for m in candidate.members}
        share = np.array([total.get(p, 0.0) for p in paths]) / sum(total.values())
        return -float(np.square(share - np.array([0, 1 / 3, 0, 2 / 3, 0])).sum())

    greedy = streamsoup.greedy(paths, tmp_path / "greedy", score=score, rounds=3)
    kept = {order[m.path]: m.weight for m in greedy.members}
    assert set(kept) == {1, 3}, "the test wants two that are kept"
    batches = make_batches(4)
    weights = [kept[1], kept[3]]
    expected = learn_in_memory(module, [states[1], states[3]], cross_entropy, [batches] * 2, init=weights)
    result = streamsoup.learn(
        paths, module, cross_entropy, Restartable(batches), tmp_path / "soup", init=greedy, restrict=True, epochs=2
    )
    assert result.ingredients == (paths[1], paths[3])
    assert_same_way(result, expected)
    # What is left out of a free mixture without restrict may come back.
    everyone = [kept.get(i, 0.0) for i in range(5)]
    options = {"parametrisation": "free", "lr": 0.05}
    expected = learn_in_memory(module, states, cross_entropy, [batches] * 2, init=everyone, **options)
    result = streamsoup.learn(paths, module, cross_entropy, Restartable(batches), init=greedy, epochs=2, **options)
    assert_same_way(result, expected)
    assert (result.coefficients != 0).all()


def test_a_list_is_shuffled_by_seed_and_epoch(pool):
    """Each epoch a permutation of its own; every batch once; the same seed the same order; the numbers follow it."""
    module, states, paths = pool
    batches = make_batches(6)

    def run(seed, epochs=3):
        seen = []

        def forward(net, x):
            seen.append(next(i for i, (y, _) in enumerate(batches) if y is x))
            return net(x)

        result = streamsoup.learn(
            paths, module, cross_entropy, batches, epochs=epochs, seed=seed, forward=forward, lr=0.05
        )
        return [seen[i : i + 6] for i in range(0, len(seen), 6)], result

    order, result = run(0)
    assert all(sorted(epoch) == list(range(6)) for epoch in order)
    assert len({tuple(epoch) for epoch in order}) == 3
    again, same = run(0)
    assert again == order
    assert np.array_equal(same.coefficients, result.coefficients)
    other, _ = run(1)
    assert other != order
    expected = learn_in_memory(module, states, cross_entropy, [[batches[i] for i in e] for e in order], lr=0.05)
    assert_same_way(result, expected)


def test_an_optimiser_of_ones_own_is_used_with_its_momentum(pool):
    module, states, paths = pool
    batches = make_batches(4)
    made = []

    def make(groups):
        made.append(torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True))
        return made[-1]

    result = streamsoup.learn(paths, module, cross_entropy, Restartable(batches), epochs=2, optimizer=make, by="layer")
    assert len(made) == 1
    # By hand: momentum on the plain gradients, from two runs of the reference that share nothing with the optimiser.
    groups = groups_of("layer", states[0])
    raw = torch.full((len(groups), 5), -np.log(5), dtype=torch.float64, requires_grad=True)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    mover = torch.optim.SGD([raw, beta], lr=0.01, momentum=0.9, nesterov=True)
    row_of = {n: r for r, names in enumerate(groups.values()) for n in names}
    for _ in range(2):
        for x, y in batches:
            alpha = raw.softmax(1)
            theta = {n: sum(alpha[row_of[n], i] * s[n] for i, s in enumerate(states)) for n in states[0]}
            mover.zero_grad()
            cross_entropy(torch.func.functional_call(module, theta, (x,)) * beta, y).backward()
            mover.step()
    np.testing.assert_allclose(result.coefficients, raw.softmax(1).detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose(result.temperature, float(beta.detach()), rtol=1e-9)


@pytest.mark.parametrize("shape", ["tuple", "mapping", "logits", "forward"])
def test_inputs_and_outputs_may_have_several_forms(pool, shape):
    module, _, paths = pool
    batches = make_batches(3)
    plain = streamsoup.learn(paths, module, cross_entropy, batches, epochs=1)

    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(Net):
        def forward(self, x):
            return Output(super().forward(x)) if shape == "logits" else super().forward(x)

    net = Wrapped().double()
    forward = {}
    if shape == "tuple":
        batches = [((x,), y) for x, y in batches]
    if shape == "mapping":
        batches = [({"x": x}, y) for x, y in batches]
    if shape == "forward":
        batches = [((x, "ignored"), y) for x, y in batches]
        forward = {"forward": lambda net, inputs: net(inputs[0])}
    result = streamsoup.learn(paths, net, cross_entropy, batches, epochs=1, **forward)
    assert np.array_equal(result.coefficients, plain.coefficients)


# -- what of the module takes part ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["model", "layer", "tensor"])
def test_statistics_are_mixed_and_unused_parameters_do_not_mind(tmp_path, by):
    module = Statistics().double().eval()
    states = stored_states(module, 4)
    paths = write_states(tmp_path, states)
    batches = make_batches(4)
    options = {"by": by, "lr": 0.05, "weight_decay": 0.1, "parametrisation": "free"}
    expected = learn_in_memory(module, states, cross_entropy, [batches] * 2, **options)
    module.norm.num_batches_tracked.fill_(99)
    result = streamsoup.learn(
        paths, module, cross_entropy, Restartable(batches), tmp_path / "soup", epochs=2, **options
    )
    assert_same_way(result, expected)
    assert not module.training
    stored = read_checkpoint(tmp_path / "soup")
    assert same_bits(stored, {n: as_array(t) for n, t in module.state_dict().items()})
    assert stored["norm.num_batches_tracked"] == 0


def test_a_layer_that_the_loss_does_not_see_keeps_its_coefficients(tmp_path):
    module = Statistics().double().eval()
    paths = write_states(tmp_path, stored_states(module, 3))
    result = streamsoup.learn(paths, module, cross_entropy, make_batches(3), by="layer", epochs=1)
    found = in_names(result)
    assert np.allclose(found["idle"], 1 / 3, atol=1e-15)
    assert np.abs(found["first"] - 1 / 3).max() > 1e-3


def test_frozen_parameters_count(pool):
    module, _, paths = pool
    batches = make_batches(4)
    free = streamsoup.learn(paths, module, cross_entropy, batches, epochs=1, by="tensor")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    frozen = streamsoup.learn(paths, module, cross_entropy, batches, epochs=1, by="tensor")
    assert np.array_equal(free.coefficients, frozen.coefficients)
    assert not any(p.requires_grad for p in module.parameters())


class Tied(nn.Module):
    """The entrance is the exit, too."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 6, bias=False)
        self.middle = nn.Linear(6, 6)
        self.leave = nn.Linear(6, 6, bias=False)
        self.leave.weight = self.enter.weight

    def forward(self, x):
        return self.leave(torch.tanh(self.middle(self.enter(x))))


@pytest.mark.parametrize("stored", ["one", "two"])
@pytest.mark.parametrize("by", ["model", "layer", "tensor", ("enter.*",), ("leave.*",)])
def test_tied_parameters_are_one(tmp_path, stored, by):
    module = Tied().double()
    names = ["enter.weight", "middle.weight", "middle.bias"]
    states = stored_states(module, 3, names=names)
    kept = [s | {"leave.weight": s["enter.weight"].clone()} if stored == "two" else s for s in states]
    paths = write_states(tmp_path, kept)
    batches = make_batches(4, classes=6)
    if by == ("leave.*",):  # the second name goes where the first goes, and nothing else fits
        with pytest.raises(streamsoup.StreamsoupError, match=r"leave\.\*"):
            streamsoup.learn(paths, module, cross_entropy, batches, by=by)
        return
    result = streamsoup.learn(
        paths, module, cross_entropy, Restartable(batches), tmp_path / "soup", by=by, epochs=2, lr=0.05
    )
    # In memory with one name: functional_call ties by itself.
    expected = learn_in_memory(module, states, cross_entropy, [batches] * 2, by=by, lr=0.05)
    assert_same_way(result, expected)
    soup = as_tensors(read_checkpoint(tmp_path / "soup"))
    assert set(soup) == set(kept[0])
    if stored == "two":
        assert torch.equal(soup["leave.weight"], soup["enter.weight"])
    assert torch.equal(module.leave.weight, soup["enter.weight"])
    assert module.leave.weight is module.enter.weight


def test_ingredients_of_unequal_dtypes_are_mixed(tmp_path):
    module = make_net(dtype=torch.float32)
    kinds = ["F32", "BF16", "F16", "F64"]
    states = [stored_states(module, 1, dtype=k, seed=i)[0] for i, k in enumerate(kinds)]
    paths = write_states(tmp_path, states)
    # Autograd in float64 at the float32 soup: near, not equal.
    batches = make_batches(4)
    expected = learn_in_memory(make_net(), states, cross_entropy, [batches] * 2, lr=0.05)
    plain = [(x.float(), y) for x, y in batches]
    result = streamsoup.learn(paths, module, cross_entropy, Restartable(plain), tmp_path / "soup", epochs=2, lr=0.05)
    assert_same_way(result, expected, tolerance=1e-4)
    again = streamsoup.soup(paths, tmp_path / "again", coefficients=result.coefficients[0].tolist())
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(again.path))


# -- what is written -----------------------------------------------------------------------------------------------


def learned(folder, dtype, *, by, out="soup", spread=0.3, **options):
    """Learn in a module of the soup's own dtype; the loss in float64."""
    module = make_net(dtype=torch.float64)
    paths = write_states(folder, stored_states(module, 4, dtype=dtype, spread=spread), shards=2)
    module = module.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(dtype, torch.float64))
    batches = make_batches(3, dtype=next(module.parameters()).dtype)

    def loss_fn(logits, targets):
        return cross_entropy(logits.double(), targets)

    result = streamsoup.learn(paths, module, loss_fn, batches, folder / out, by=by, epochs=2, **options)
    return module, paths, result


@pytest.mark.parametrize(
    ("dtype", "parametrisation"),
    [("BF16", "softmax"), ("BF16", "free"), ("F16", "free"), ("F32", "softmax"), ("F64", "free")],
)
def test_the_soup_is_that_of_the_command_line(tmp_path, cli, dtype, parametrisation):
    module, paths, result = learned(tmp_path, dtype, by="model", parametrisation=parametrisation, lr=0.4)
    numbers = [repr(float(x)) for x in result.coefficients[0]]
    assert parametrisation == "softmax" or any(x.startswith("-") for x in numbers), "negative numbers are tried, too"
    done = cli("soup", "--coefficients", *(f"{p}:{x}" for p, x in zip(paths, numbers, strict=True)), "-o", "again")
    assert done.returncode == 0, done.stderr
    soup = read_checkpoint(tmp_path / "soup")
    assert same_bits(soup, read_checkpoint(tmp_path / "again"))
    assert same_bits(soup, {n: as_array(t) for n, t in module.state_dict().items()})


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("by", ["layer", "tensor", PATTERNS])
def test_the_soup_is_that_of_its_recipe_file(tmp_path, dtype, by):
    module, _, result = learned(tmp_path, dtype, by=by, lr=0.4)
    (tmp_path / "mine.yaml").write_text(recipe_to_yaml(result.recipe), encoding="utf-8")
    recipe = streamsoup.read_recipe(tmp_path / "mine.yaml")
    assert recipe == result.recipe
    from streamsoup.cook import cook

    cook(recipe, tmp_path / "again", streamsoup.Execution(workers=1))
    published = streamsoup.read_recipe(tmp_path / "soup" / "recipe.yaml")
    cook(published, tmp_path / "published", streamsoup.Execution())
    soup = read_checkpoint(tmp_path / "soup")
    assert same_bits(soup, read_checkpoint(tmp_path / "again"))
    assert same_bits(soup, read_checkpoint(tmp_path / "published"))
    assert same_bits(soup, {n: as_array(t) for n, t in module.state_dict().items()})
    # Group by group, with numpy at hand: the coefficients are where they belong.
    states = [as_tensors(read_checkpoint(Path(path))) for path in result.ingredients]
    names = groups_of(by, states[0])
    for group, row in in_names(result).items():
        for name in names[group]:
            mixed = sum(x * s[name].double() for x, s in zip(row, states, strict=True))
            near = torch.from_numpy(soup[name].astype(np.float64))
            eps = torch.finfo(as_tensors({"x": soup[name]})["x"].dtype).eps
            assert torch.allclose(near, mixed, rtol=2 * eps, atol=8 * 2.0**-52)


def test_the_recipe_runs_at_the_command_line(tmp_path, cli):
    learned(tmp_path, "BF16", by="tensor")
    done = cli("soup", "--recipe", tmp_path / "soup" / "recipe.yaml", "-o", "again")
    assert done.returncode == 0, done.stderr
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "again"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_another_dtype_may_be_asked_for(tmp_path, dtype):
    kind = getattr(torch, dtype)
    module = make_net().to(kind)
    paths = write_states(tmp_path, stored_states(module, 3, dtype="F32"))
    batches = make_batches(3, dtype=kind)
    result = streamsoup.learn(
        paths, module, lambda z, y: cross_entropy(z.double(), y), batches, tmp_path / "soup", dtype=dtype, by="layer"
    )
    soup = read_checkpoint(tmp_path / "soup")
    assert same_bits(soup, {n: as_array(t) for n, t in module.state_dict().items()})
    assert {as_tensors({"x": a})["x"].dtype for a in soup.values()} == {kind}
    assert result.recipe.dtype is not None


def test_a_single_file_may_be_asked_for(tmp_path):
    module, _, result = learned(tmp_path, "F32", by="model", out="soup.safetensors")
    assert result.path == tmp_path / "soup.safetensors"
    assert same_bits(read_checkpoint(result.path), {n: as_array(t) for n, t in module.state_dict().items()})


def test_what_was_learned_lies_beside_the_soup(tmp_path):
    _, _, result = learned(tmp_path, "F32", by="layer")
    document = json.loads((tmp_path / "soup" / "learned.json").read_text(encoding="utf-8"))
    assert document.pop("id")
    assert document == json.loads(json.dumps(result.to_json()))
    assert document["coefficients"] == {g: row.tolist() for g, row in in_names(result).items()}
    assert (tmp_path / "soup" / "config.json").exists()
    assert (tmp_path / "soup" / "streamsoup.json").exists()
    assert not (tmp_path / "soup.partial").exists()


def test_without_a_place_only_the_module_has_the_soup(tmp_path):
    module = make_net()
    paths = write_states(tmp_path, stored_states(module, 3))
    before = sorted(p.name for p in tmp_path.iterdir())
    result = streamsoup.learn(paths, module, cross_entropy, make_batches(2), by="layer", epochs=1)
    assert result.path is None
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    from streamsoup.cook import cook

    cook(result.recipe, tmp_path / "soup", streamsoup.Execution())
    assert same_bits(read_checkpoint(tmp_path / "soup"), {n: as_array(t) for n, t in module.state_dict().items()})


def test_a_soup_that_exists_is_replaced_on_request_only(tmp_path):
    module, paths, first = learned(tmp_path, "F32", by="model")
    batches = make_batches(3, seed=3, dtype=torch.float32)
    with pytest.raises(streamsoup.StreamsoupError, match="exists already"):
        streamsoup.learn(paths, module, cross_entropy, batches, tmp_path / "soup")
    assert np.array_equal(first.coefficients[0], [i.weight for i in streamsoup.read_recipe(
        tmp_path / "soup" / "recipe.yaml").ingredients])  # fmt: skip
    second = streamsoup.learn(paths, module, cross_entropy, batches, tmp_path / "soup", overwrite=True)
    assert not np.array_equal(first.coefficients, second.coefficients)
    assert same_bits(read_checkpoint(tmp_path / "soup"), {n: as_array(t) for n, t in module.state_dict().items()})


def test_records_say_what_was_done(pool):
    module, _, paths = pool
    seen = []
    result = streamsoup.learn(
        paths, module, cross_entropy, make_batches(5), accumulate=2, epochs=2, on_step=seen.append,
        budget_bytes="200MiB", read_mode="map",
    )  # fmt: skip
    assert tuple(seen) == result.steps
    assert [s.epoch for s in seen] == [1, 1, 1, 2, 2, 2]
    whole = sum(t.nbytes for path in paths for t in read_checkpoint(Path(path)).values())
    assert {s.bytes_read for s in seen} == {whole}, "one reading for each step, where a group fits the budget"
    assert result.bytes_read == 7 * whole, "and one to begin"
    assert result.projected_peak_bytes <= 200 << 20


def test_the_user_s_random_numbers_are_left_alone(pool):
    module, _, paths = pool
    torch.manual_seed(123)
    before = torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()
    streamsoup.learn(paths, module, cross_entropy, make_batches(3), held_out=make_batches(1), epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)


def test_dropout_is_of_the_seed_and_of_nothing_else(tmp_path):
    module = Dropping().double().train()
    paths = write_states(tmp_path, stored_states(module, 3))
    batches = make_batches(4)

    def run(user_seed, **options):
        torch.manual_seed(user_seed)
        before = torch.get_rng_state()
        result = streamsoup.learn(paths, module, cross_entropy, batches, epochs=2, **options)
        assert torch.equal(torch.get_rng_state(), before)
        assert module.training
        return result.coefficients

    assert np.array_equal(run(1), run(2))
    assert not np.array_equal(run(1), run(1, seed=5))
    masks = []
    streamsoup.learn(
        paths, module, cross_entropy, [(torch.ones(8, 6, dtype=torch.float64), torch.zeros(8, dtype=torch.long))] * 6,
        epochs=1, accumulate=2, forward=lambda net, x: masks.append(torch.nn.functional.dropout(x, 0.5)) or net(x),
    )  # fmt: skip
    assert len({m.numpy().tobytes() for m in masks}) == 6, "each batch has numbers of its own"


def test_the_module_keeps_its_flags_and_no_gradient(pool):
    module, _, paths = pool
    module.layers[0].weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    same = dict(module.named_parameters())
    streamsoup.learn(paths, module, cross_entropy, make_batches(3), epochs=1)
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert all(p.grad is None for p in module.parameters())
    assert all(same[n] is p for n, p in module.named_parameters()), "parameters are overwritten, not replaced"


def test_a_copy_of_the_module_learns_the_same(pool):
    """The module's own numbers do not matter."""
    module, _, paths = pool
    other = make_net(seed=9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(float("nan"))
    first = streamsoup.learn(paths, copy.deepcopy(module), cross_entropy, make_batches(3), by="layer")
    second = streamsoup.learn(paths, other, cross_entropy, make_batches(3), by="layer")
    assert np.array_equal(first.coefficients, second.coefficients)


def test_names_in_another_order_and_other_shards_are_the_same_ingredients(pool, tmp_path):
    module, states, paths = pool
    rng = np.random.default_rng(0)
    others = []
    for i, state in enumerate(states):
        names = list(state) if i == 0 else [list(state)[k] for k in rng.permutation(len(state))]
        arrays = {n: as_array(state[n]) for n in names}
        others.append(str(write_checkpoint(tmp_path / f"other{i}", arrays, shards=None if i == 0 else i)))
    first = streamsoup.learn(paths, module, cross_entropy, make_batches(3), by="tensor")
    second = streamsoup.learn(others, module, cross_entropy, make_batches(3), by="tensor")
    assert first.groups == second.groups
    assert np.array_equal(first.coefficients, second.coefficients)


def test_few_examples_are_noted(pool):
    module, _, paths = pool
    few = streamsoup.learn(paths, module, cross_entropy, make_batches(3), epochs=1, by="tensor")
    assert any("24 examples are few" in note for note in few.notes)
    enough = streamsoup.learn(paths, module, cross_entropy, make_batches(15), epochs=1)
    assert not enough.notes, "120 examples for four free coefficients"
