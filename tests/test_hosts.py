"""streamsoup inside torch and transformers, as they are installed."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel
from torch.optim.swa_utils import update_bn

import streamsoup
from streamsoup.errors import MismatchError, NonFiniteError, RecipeError
from streamsoup.hosts.averaged_model import AveragedModel

BUDGET = 1 << 27


class Net(torch.nn.Module):
    """Tied weights, normalisation, a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6, bias=False)
        self.norm = torch.nn.BatchNorm1d(6)
        self.last = torch.nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.ones(6), persistent=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x))) * self.scale


def train(net, steps, seen):
    """Move a module at random, and show it some data, `steps` times."""
    torch.manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        net(torch.randn(8, 6, dtype=net.scale.dtype))
        seen(net)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_it_is_torchs_average(use_buffers):
    net = Net().double()
    ours = AveragedModel(net, use_buffers=use_buffers, options={"budget_bytes": BUDGET})
    theirs = TorchAveragedModel(net, use_buffers=use_buffers)

    def both(model):
        ours.update_parameters(model)
        theirs.update_parameters(model)

    train(net, 12, both)
    assert ours.n_averaged == theirs.n_averaged == 12
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        if "num_batches" in name and use_buffers:
            continue  # an integer: torch averages it with a float, and drops the rest
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)
    assert ours.module.last.weight is ours.module.first.weight


def test_float32_is_rounded_once():
    net, exact = Net(), []
    ours = AveragedModel(net, options={"budget_bytes": BUDGET})

    def seen(model):
        exact.append(model.first.weight.detach().double().clone())
        ours.update_parameters(model)

    train(net, 20, seen)
    mean = torch.stack(exact).sum(0) / 20
    assert torch.equal(ours.module.first.weight, mean.float())


def test_the_budget_follows_the_model(monkeypatch):
    """A default budget that is too small for the sum must not stop a training loop."""
    monkeypatch.setattr("streamsoup.pool.default_budget_bytes", lambda: 64 << 20)
    model = torch.nn.Linear(2500, 2500)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average.module.weight, model.weight)


def test_update_bn_makes_statistics_of_the_average():
    net = Net()
    ours = AveragedModel(net, options={"budget_bytes": BUDGET})
    train(net, 3, ours.update_parameters)
    data = [torch.randn(16, 6) for _ in range(4)]
    before = ours.module.norm.running_mean.clone()
    update_bn(data, ours)
    expected = torch.stack([ours.module.first(batch).mean(0) for batch in data]).mean(0)
    torch.testing.assert_close(ours.module.norm.running_mean, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(before, ours.module.norm.running_mean)
    assert torch.isfinite(ours(data[0])).all()


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_it_goes_on_from_the_rounded_average(way):
    net = Net()
    ours = AveragedModel(net, options={"budget_bytes": BUDGET})
    train(net, 4, ours.update_parameters)
    if way == "state_dict":
        again = AveragedModel(Net(), options={"budget_bytes": BUDGET})
        again.load_state_dict(ours.state_dict())
    else:
        again = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in ours.state_dict().items())
    train(net, 2, lambda model: [soup.update_parameters(model) for soup in (ours, again)])
    assert again.n_averaged == 6
    torch.testing.assert_close(again.module.first.weight, ours.module.first.weight, rtol=2e-7, atol=1e-8)


def test_what_is_refused_leaves_the_average():
    net = Net()
    ours = AveragedModel(net, options={"budget_bytes": BUDGET})
    train(net, 2, ours.update_parameters)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        net.last.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"last\.bias"):
        ours.update_parameters(net)
    with pytest.raises(MismatchError):
        ours.update_parameters(torch.nn.Linear(2, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    """Make a tiny Llama whose head is tied to its embedding."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return lambda: LlamaForCausalLM(config)


def save_runs(make, folder, names):
    torch.manual_seed(0)
    model = make()
    for name in names:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in names]


@pytest.mark.filterwarnings("ignore")
def test_a_soup_goes_straight_into_a_live_model(llama, tmp_path):
    from streamsoup.hosts.transformers import load_soup

    paths = save_runs(llama, tmp_path, ["a", "b", "c"])
    model = llama()
    assert load_soup(model, paths, weights=[1, 2, 1], budget_bytes=BUDGET) is model
    streamsoup.soup(paths, tmp_path / "soup", weights=[1, 2, 1])
    written = load_file(tmp_path / "soup" / "model.safetensors")
    assert "lm_head.weight" not in written
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in written.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()
    untied = llama()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(torch.zeros(32, 16))
    with pytest.raises(MismatchError, match=r"lm_head\.weight: in the module, but not in the soup"):
        load_soup(untied, paths)


def trainer(tmp_path, **more):
    """What callbacks look at."""
    arguments = SimpleNamespace(**{"output_dir": str(tmp_path), "save_total_limit": None, "world_size": 1, **more})
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    return arguments, state


def drive(callback, arguments, state, steps, model=None):
    """Call a callback as the `Trainer` does."""
    callback.on_train_begin(arguments, state, None)
    for step in steps:
        state.global_step = step
        callback.on_save(arguments, state, None)
    callback.on_train_end(arguments, state, None, model=model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [None, 2])
def test_a_callback_averages_what_is_saved(llama, tmp_path, window):
    from streamsoup.hosts.transformers import SoupCallback

    paths = save_runs(llama, tmp_path, [f"checkpoint-{step}" for step in (5, 10, 15, 20)])
    callback = SoupCallback(
        tmp_path / "sums", window=window, out=tmp_path / "out", load_at_end=True, budget_bytes=BUDGET
    )
    model = llama()
    drive(callback, *trainer(tmp_path), (5, 10, 15, 15, 20), model)
    streamsoup.soup(paths if window is None else paths[-window:], tmp_path / "soup")
    expected = load_file(tmp_path / "soup" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_though_old_checkpoints_are_gone(llama, tmp_path):
    from streamsoup.hosts.transformers import SoupCallback

    paths = save_runs(llama, tmp_path, [f"checkpoint-{step}" for step in (5, 10, 15)])
    streamsoup.soup(paths, tmp_path / "soup")
    options = {"out": tmp_path / "out", "budget_bytes": BUDGET}
    arguments, state = trainer(tmp_path, save_total_limit=1)
    first = SoupCallback(tmp_path / "sums", **options)
    first.on_train_begin(arguments, state, None)
    for step in (5, 10):
        state.global_step = step
        first.on_save(arguments, state, None)
    first._running.close()
    shutil.rmtree(paths[0])
    state.global_step = 5
    with pytest.raises(RecipeError, match=r"holds .*checkpoint-10, but training begins at step 5"):
        SoupCallback(tmp_path / "sums", **options).on_train_begin(arguments, state, None)
    state.global_step = 10
    again = SoupCallback(tmp_path / "sums", **options)
    again.on_train_begin(arguments, state, None)
    shutil.rmtree(paths[1])
    state.global_step = 15
    again.on_save(arguments, state, None)
    again.on_train_end(arguments, state, None)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("soup", "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_callback_refuses_what_cannot_work(tmp_path):
    from streamsoup.hosts.transformers import SoupCallback

    with pytest.raises(RecipeError, match="window: 0"):
        SoupCallback(tmp_path, window=0)
    with pytest.raises(RecipeError, match=r"save_total_limit keeps 3 .* Give save_total_limit=4"):
        SoupCallback(tmp_path, window=3).on_train_begin(*trainer(tmp_path, save_total_limit=3), None)
    with pytest.raises(RecipeError, match="several processes"):
        SoupCallback(tmp_path, load_at_end=True).on_train_begin(*trainer(tmp_path, world_size=2), None)
    arguments, state = trainer(tmp_path)
    state.is_world_process_zero = False
    SoupCallback(tmp_path / "sums").on_save(arguments, state, None)
    assert not (tmp_path / "sums").exists()
