"""What cannot be learned is refused in one clear sentence, and the module is left as it was found."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import write_checkpoint
from learning_pools import Net, Statistics, as_array, make_batches, stored_states, write_states
from torch import nn
from torch.nn.functional import cross_entropy

import streamsoup
from streamsoup.errors import (
    BudgetError,
    ChangedIngredientError,
    CheckpointError,
    DestinationError,
    MismatchError,
    NonFiniteError,
    RecipeError,
    ResumeError,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny networks are no work for several threads of torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def paths(tmp_path, module):
    return write_states(tmp_path / "runs", stored_states(module, 3))


def refused(error, match, paths, module, *, batches=None, loss_fn=cross_entropy, **options):
    """Learn, expect one sentence (or two) on one line, and a module whose flags are what they were."""
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    mode = module.training
    random_numbers = torch.get_rng_state()
    out = options.pop("out", None)
    with pytest.raises(error, match=match) as caught:
        streamsoup.learn(paths, module, loss_fn, make_batches(3) if batches is None else batches, out, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert all(p.grad is None for p in module.parameters())
    assert module.training == mode
    assert torch.equal(torch.get_rng_state(), random_numbers)
    return str(caught.value)


# -- the module ----------------------------------------------------------------------------------------------------


class Shorter(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


class Longer(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Shorter, r"norm\.weight: in the soup, but not in the module"),
        (Longer, r"extra\.weight: in the module, but not in the soup"),
        (lambda: Net(classes=5), r"leave\.weight: shape \(5, 9\) in the module, but \(4, 9\) in the soup"),
        (lambda: Net().to("meta"), "meta device"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_unchanged(paths, tmp_path, make, match):
    module = make().double()
    before = {n: None if p.is_meta else p.detach().clone() for n, p in module.named_parameters()}
    work, out = tmp_path / "work", tmp_path / "soup"
    refused(MismatchError, match, paths, module, workdir=work, out=out)
    assert all(before[n] is None or torch.equal(before[n], p) for n, p in module.named_parameters())
    assert not work.exists()
    assert not out.exists()


def test_an_integer_parameter_is_refused(paths, module):
    for name in ("weight", "bias"):
        whole = getattr(module.layers[0], name).detach().long()
        setattr(module.layers[0], name, nn.Parameter(whole, requires_grad=False))
    refused(MismatchError, r"layers\.0\.\w+: is no float in the module", paths, module)


def test_a_module_without_a_parameter_of_the_ingredients_is_refused(tmp_path):
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.zeros(3))

    paths = [str(write_checkpoint(tmp_path / f"r{i}", {"w": np.full(3, i, np.float32)})) for i in range(2)]
    refused(MismatchError, "No averaged tensor", paths, Buffers())


def test_a_parameter_that_is_not_contiguous_is_refused(paths, module):
    module.layers[1].weight = nn.Parameter(module.layers[1].weight.detach().T)
    refused(MismatchError, r"layers\.1\.weight: is not contiguous", paths, module)


# -- batches and loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [3, (1, 2, 3), torch.zeros(8, 6), None], ids=str)
def test_a_batch_that_is_no_pair_is_refused(paths, module, batch):
    refused(RecipeError, "pair of inputs and targets", paths, module, batches=[batch])
    refused(RecipeError, "pair of inputs and targets", paths, module, held_out=[batch])


@pytest.mark.parametrize("batches", [[], (), iter(())])
def test_empty_batches_are_refused(paths, module, batches):
    refused(RecipeError, "no more than 0 steps", paths, module, batches=batches)


def test_empty_held_out_batches_are_refused(paths, module):
    refused(RecipeError, "no held-out batches", paths, module, held_out=[])


def test_batches_that_can_be_gone_through_once_are_refused_in_the_second_epoch(paths, module, tmp_path):
    refused(RecipeError, "begun anew", paths, module, batches=iter(make_batches(3)), out=tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    once = streamsoup.learn(paths, module, cross_entropy, iter(make_batches(3)), epochs=1)
    assert len(once.steps) == 3


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [1, 4])
def test_a_loss_that_is_no_number_is_refused(paths, module, tmp_path, number, step):
    calls = []

    def loss_fn(logits, targets):
        calls.append(1)
        loss = cross_entropy(logits, targets)
        return loss * number if len(calls) == step else loss

    work = tmp_path / "work"
    refused(NonFiniteError, f"The loss is {number}", paths, module, loss_fn=loss_fn, workdir=work)
    # The work folder holds the steps before it.
    assert (work / "state.safetensors").exists() == (step > 1)


def test_a_gradient_that_is_no_number_is_refused(paths, module):
    def loss_fn(logits, targets):
        return torch.sqrt((logits * 0).sum())  # 0, with a gradient of 0 times infinity

    refused(NonFiniteError, "gradient", paths, module, loss_fn=loss_fn, temperature=False)


def test_an_exception_of_the_loss_comes_through_and_cleans_up(paths, module, tmp_path):
    module.enter.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    calls = []

    def loss_fn(logits, targets):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("labels")
        return cross_entropy(logits, targets)

    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="labels"):
        streamsoup.learn(paths, module, loss_fn, make_batches(3), tmp_path / "soup", accumulate=3)
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


# -- ingredients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_nan_in_an_ingredient_names_tensor_and_ingredient(tmp_path, module, number):
    states = stored_states(module, 3)
    states[1]["layers.1.weight"][2, 3] = number
    paths = write_states(tmp_path, states)
    said = refused(NonFiniteError, r"layers\.1\.weight: 1 NaN or infinite", paths, module)
    assert paths[1] in said
    assert paths[0] not in said


def test_nan_that_is_let_through_ends_at_the_loss(tmp_path, module):
    states = stored_states(module, 3)
    states[1]["layers.1.weight"][2, 3] = float("nan")
    paths = write_states(tmp_path, states)
    refused(NonFiniteError, "The loss is nan", paths, module, nonfinite="allow")


def test_unequal_counters_are_refused_or_the_first_is_taken(tmp_path):
    module = Statistics().double().eval()
    states = stored_states(module, 3)
    for i, state in enumerate(states):
        state["norm.num_batches_tracked"] = torch.tensor(i + 5)
    paths = write_states(tmp_path, states)
    refused(MismatchError, r"norm\.num_batches_tracked: I64 buffer .* differs", paths, module)
    streamsoup.learn(paths, module, cross_entropy, make_batches(2), epochs=1, buffers="first")
    assert int(module.norm.num_batches_tracked) == 5


def test_ingredients_that_do_not_fit_together_are_refused(tmp_path, module):
    paths = write_states(tmp_path, stored_states(module, 2))
    other = write_states(tmp_path / "other", stored_states(Net(width=10), 1))
    refused(MismatchError, "shape", paths + other, module)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_ingredients_are_refused(paths, module, count):
    refused(RecipeError, "two ingredients at least", paths[:count], module)


def test_a_greedy_soup_of_one_is_that_one_and_says_so(paths, module):
    result = streamsoup.learn(paths, module, cross_entropy, make_batches(3), init=[0.0, 1.0, 0.0], restrict=True)
    assert result.coefficients.tolist() == [[1.0]]
    assert "nothing to mix" in result.notes[0]
    assert str(paths[1]) in result.notes[0]


def test_an_ingredient_named_twice_is_refused(paths, module):
    refused(RecipeError, "named twice", [*paths, paths[0]], module)


def test_a_missing_ingredient_is_refused(paths, module, tmp_path):
    refused(CheckpointError, "nowhere", [*paths, str(tmp_path / "nowhere")], module)


@pytest.mark.parametrize("when", [1, 2])
def test_data_that_change_while_it_learns_are_noticed(paths, module, tmp_path, when):
    file = Path(paths[1]) / "model.safetensors"

    def change(record):
        if record.step == when:
            with file.open("r+b") as opened:
                opened.seek(-2, 2)
                opened.write(b"\x11")

    with pytest.raises(ChangedIngredientError, match=re.escape(paths[1])):
        streamsoup.learn(
            paths,
            module,
            cross_entropy,
            make_batches(3),
            tmp_path / "soup",
            epochs=1,
            on_step=change,
            read_mode="plain",
        )
    assert not (tmp_path / "soup").exists()


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temprature": True}, "temprature"),
        ({"by": "layers"}, "by: 'layers'"),
        ({"by": ["*.bias", "encoder.*"]}, r"'encoder\.\*' fits no tensor"),
        ({"by": ["*", "*.bias"]}, r"'\*\.bias' fits no tensor that an earlier pattern does not"),
        ({"by": []}, "not a list of patterns"),
        ({"by": [1]}, "not a list of patterns"),
        ({"parametrisation": "sigmoid"}, "sigmoid"),
        ({"optimizer": "lbfgs"}, "lbfgs"),
        ({"lr": 0}, "lr: 0"),
        ({"lr": -1.0}, "lr: -1"),
        ({"lr": float("nan")}, "lr: nan"),
        ({"epochs": 0}, "epochs: 0"),
        ({"accumulate": 0}, "accumulate: 0"),
        ({"patience": 0, "held_out": make_batches(1)}, "patience: 0"),
        ({"workers": 0}, "workers: 0"),
        ({"read_mode": "fast"}, "fast"),
        ({"init": [1.0, 2.0]}, "3 ingredients, but 2 weights"),
        ({"init": [1.0, float("nan"), 1.0]}, "finite"),
        ({"init": [1.0, -1.0, 0.0]}, "above zero"),
        ({"init": {"/nowhere": 1.0}}, "/nowhere"),
        ({"init": [0.5, 0.5, 0.0]}, "zero"),
        ({"init": [2.0, 0.5, -0.5]}, "zero"),
        ({"budget_bytes": "ten"}, "ten"),
        ({"dtype": "int8"}, "int8"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(paths, module, options, match):
    refused(RecipeError, match, paths, module, **options)


def test_a_budget_that_is_too_small_is_refused(paths, module):
    refused(BudgetError, "too small", paths, module, budget_bytes=1)


def test_options_that_are_none_are_those_by_default(paths, module):
    plain = streamsoup.learn(paths, module, cross_entropy, make_batches(2), epochs=1)
    given = streamsoup.learn(
        paths, module, cross_entropy, make_batches(2), epochs=1, lr=None, dtype=None, seed=None, patience=None
    )
    assert np.array_equal(plain.coefficients, given.coefficients)


def test_a_free_mixture_may_begin_at_zero(paths, module):
    result = streamsoup.learn(
        paths, module, cross_entropy, make_batches(2), init=[1, 0, 0], parametrisation="free", epochs=1, lr=0.01
    )
    assert result.coefficients.shape == (1, 3)


# -- places --------------------------------------------------------------------------------------------------------


def test_a_soup_does_not_go_into_an_ingredient(paths, module):
    for out in (Path(paths[0]), Path(paths[0]) / "soup", Path(paths[0]).parent):
        said = refused(DestinationError, "the ingredient", paths, module, out=out)
        assert str(out) in said
    file = Path(paths[0]) / "model.safetensors"
    refused(DestinationError, "the ingredient", paths, module, out=file, overwrite=True)
    assert sorted(p.name for p in Path(paths[0]).iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_soup_is_not_replaced(paths, module, tmp_path, overwrite):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_text("meow")
    steps = []
    refused(DestinationError, "photos", paths, module, out=out, overwrite=overwrite, on_step=steps.append)
    assert not steps, "it is known before anything is learned"
    assert (out / "cat.jpg").read_text() == "meow"


def test_unfinished_work_of_a_soup_is_not_thrown_away(paths, module, tmp_path):
    partial = tmp_path / "soup.partial"
    partial.mkdir()
    (partial / "job.json").write_text("{}")
    (partial / "journal").write_text("x")
    steps = []
    refused(ResumeError, "unfinished work", paths, module, out=tmp_path / "soup", on_step=steps.append)
    assert not steps
    assert (partial / "job.json").exists()


def test_a_work_folder_that_is_a_file_is_refused(paths, module, tmp_path):
    (tmp_path / "work").write_text("")
    refused(DestinationError, "work", paths, module, workdir=tmp_path / "work")


def test_an_error_leaves_nothing_at_the_destination(tmp_path, module):
    states = stored_states(module, 3)
    paths = write_states(tmp_path / "runs", states)
    calls = []

    def loss_fn(logits, targets):
        calls.append(1)
        return cross_entropy(logits, targets) * (float("nan") if len(calls) > 2 else 1.0)

    refused(NonFiniteError, "loss", paths, module, out=tmp_path / "soup", loss_fn=loss_fn)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    assert as_array(module.enter.weight).shape == (9, 6)
