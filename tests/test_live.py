"""Live states in running sums: the bits of their files, and nothing kept of them."""

from __future__ import annotations

import gc
import json
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from factory import fine_tunes, read_checkpoint, realistic, same_bits, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import streamsoup
from streamsoup.checkpoints import open_live
from streamsoup.checkpoints.live import LiveSource
from streamsoup.errors import (
    CheckpointError,
    DestinationError,
    MismatchError,
    NonFiniteError,
    RecipeError,
    ResumeError,
    StreamsoupError,
    UnsupportedDTypeError,
)
from streamsoup.maps import bytes_at

BUDGET = 1 << 27
SHAPES = {"a.weight": (50, 70), "b.weight": (4100,), "c": (), "empty": (0, 3)}


def states(count=4, dtype=torch.float32):
    """Fine-tunes of one network, with a buffer that is the same in all."""
    found = []
    for seed in range(count):
        arrays = realistic(seed, SHAPES, "F64")
        found.append({n: torch.from_numpy(a.copy()).to(dtype) for n, a in arrays.items()})
        found[-1]["steps"] = torch.tensor([3, 4])
    return found


def saved(folder, given):
    """The same as files."""
    paths = [folder / f"run{i}.safetensors" for i in range(len(given))]
    folder.mkdir(exist_ok=True)
    for path, state in zip(paths, given, strict=True):
        save_file({n: t.contiguous() for n, t in state.items()}, path)
    return [str(path) for path in paths]


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[n].dtype == expected[n].dtype and torch.equal(found[n].view(-1), expected[n].view(-1)) for n in expected
    )


def soup_of(tmp_path, paths, weights=None):
    out = tmp_path / "reference.safetensors"
    streamsoup.soup(paths, out, weights=weights, overwrite=True)
    return load_file(out)


@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_live_states_have_the_bits_of_their_files(tmp_path, device, dtype, place):
    given = states(dtype=dtype)
    folder = tmp_path / "sums" if place == "folder" else None
    with streamsoup.RunningSoup(given[0], folder=folder, budget_bytes=BUDGET, device=device) as running:
        for state, weight in zip(given, (1.0, 2.0, 0.5, 1.0), strict=True):
            running.add(state, weight)
        expected = soup_of(tmp_path, saved(tmp_path / "files", given), [1.0, 2.0, 0.5, 1.0])
        assert same(dict(running.mean().tensors()), expected)
        assert running.mean().is_exact or dtype == torch.float64


def strided(state):
    """The same numbers, none of them in one piece."""
    found = {}
    for name, tensor in state.items():
        wide = torch.empty((*tensor.shape, 2), dtype=tensor.dtype)
        wide[..., 1] = tensor
        found[name] = wide[..., 1]
        if tensor.ndim == 2:
            found[name] = tensor.t().contiguous().t()
    return found


def test_strides_and_the_library_do_not_matter(tmp_path, device):
    given = states()
    expected = soup_of(tmp_path, saved(tmp_path / "files", given))
    ways = [
        given,
        [strided(state) for state in given],
        [{n: t.numpy() for n, t in state.items()} for state in given],
        [{n: np.array(t.numpy(), order="F") for n, t in state.items()} for state in given],
    ]
    for way in ways:
        running = streamsoup.RunningSoup(given[0], budget_bytes=BUDGET, device=device)
        for state in way:
            running.add(state)
        assert same(dict(running.mean().tensors()), expected)


def test_arrays_of_ml_dtypes_and_backwards_ones(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.standard_normal((60, 40)).astype(ml_dtypes.bfloat16)
    running = streamsoup.RunningSoup({"w": array}, budget_bytes=BUDGET)
    running.add({"w": array[::-1, ::-1]})
    found = running.mean().tensors()["w"]
    assert found.dtype == torch.bfloat16
    assert np.array_equal(found.view(torch.int16).numpy(), array[::-1, ::-1].copy().view(np.int16))


def test_what_is_in_one_piece_is_not_copied_and_the_rest_goes_through_buffers():
    given = states(1)[0]
    running = streamsoup.RunningSoup(given, budget_bytes=BUDGET)
    whole, pieces = (open_live(state, "x") for state in (given, strided(given)))
    assert not running.plan((whole,), _one(), to_sum=True).staged
    assert running.plan((pieces,), _one(), to_sum=True).staged
    source, position = LiveSource(whole), whole.table.positions()["a.weight"]
    assert source.fetch(position, 8, 16, None) == given["a.weight"].data_ptr() + 8


def _one():
    from streamsoup.methods import Coefficients

    return Coefficients((1.0,))


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4), st.randoms(use_true_random=False), st.sampled_from("iuf"),
)  # fmt: skip
def test_any_part_of_any_strides_is_copied_in_the_order_of_indices(shape, chance, kind):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype({"i": np.int8, "u": np.uint16, "f": np.float64}[kind])
    axes = list(range(len(shape)))
    chance.shuffle(axes)
    array = array.transpose(axes)[tuple(slice(None, None, chance.choice([1, -1, 2])) for _ in shape)]
    live = open_live({"w": array}, "x")
    start = chance.randrange(array.size)
    count = chance.randint(1, array.size - start)
    size = array.itemsize
    room = np.empty(count * size, np.uint8)
    address = LiveSource(live).fetch(0, start * size, count * size, room.data)
    assert bytes_at(address, count * size).tobytes() == array.flatten()[start : start + count].tobytes()


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (40, 70, 90)])
def test_what_takes_many_blocks_and_strips_is_copied_in_the_order_of_indices(shape, step):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).transpose()[::step, ::step]
    room = np.empty(array.nbytes - 40, np.uint8)
    LiveSource(open_live({"w": array}, "x")).fetch(0, 40, len(room), room.data)
    assert room.tobytes() == array.flatten()[10:].tobytes()


def test_rows_wider_than_a_strip(monkeypatch):
    monkeypatch.setattr("streamsoup.checkpoints.live.STRIP_BYTES", 64)
    array = np.arange(3 * 50 * 20, dtype=np.float32).reshape(20, 50, 3).transpose(2, 1, 0)
    room = np.empty(array.nbytes - 40, np.uint8)
    LiveSource(open_live({"w": array}, "x")).fetch(0, 40, len(room), room.data)
    assert room.tobytes() == array.flatten()[10:].tobytes()


# -- nothing is kept -------------------------------------------------------------------------------------------------


def test_nothing_is_kept_of_a_state(tmp_path):
    given = states(2)
    running = streamsoup.RunningSoup(given[0], budget_bytes=BUDGET).add(given[0])
    expected = dict(running.mean().tensors())
    for tensor in given[0].values():
        tensor.fill_(7)
    assert same(dict(running.mean().tensors()), expected)
    alive = [weakref.ref(tensor) for tensor in given[1].values()]
    running.add(given.pop())
    gc.collect()
    assert not any(tensor() is not None for tensor in alive)


def test_a_module_needs_no_file_at_all(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6))
    running = streamsoup.RunningSoup(module, budget_bytes=BUDGET)
    kept = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn_like(parameter)
        kept.append({n: t.clone() for n, t in module.state_dict().items()})
        running.add(module)
    expected = soup_of(tmp_path, saved(tmp_path / "files", kept))
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6))
    running.mean().load_into(fresh)
    assert same(dict(fresh.state_dict()), expected)


def test_tied_names_that_the_files_do_not_have_are_left_out(tmp_path):
    module = torch.nn.ModuleDict(
        {"embed": torch.nn.Linear(4, 3, bias=False), "head": torch.nn.Linear(4, 3, bias=False)}
    )
    module["head"].weight = module["embed"].weight
    file = tmp_path / "one.safetensors"
    save_file({"embed.weight": module["embed"].weight.detach().clone()}, file)
    running = streamsoup.RunningSoup(file, budget_bytes=BUDGET).add(file).add(module)
    assert torch.equal(running.mean().tensors()["embed.weight"], load_file(file)["embed.weight"])
    module["head"].weight = torch.nn.Parameter(module["embed"].weight.detach().clone())
    with pytest.raises(MismatchError, match=r"head\.weight: in live state"):
        running.add(module)


def test_files_and_live_states_in_one_sum(tmp_path):
    given = states()
    paths = saved(tmp_path / "files", given)
    running = streamsoup.RunningSoup(paths, budget_bytes=BUDGET)
    running.add(paths[0]).add(given[1]).add(paths[2], 3.0).add(given[3])
    assert same(dict(running.mean().tensors()), soup_of(tmp_path, paths, [1, 1, 3, 1]))
    running.remove(paths[0])
    assert [m.weight for m in running.members] == [1, 3, 1]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    given = states(2)
    running = streamsoup.RunningSoup(given[0], budget_bytes=BUDGET).add(given[0])
    before = dict(running.mean().tensors())
    for change, what in [
        ({"d": torch.ones(2)}, r"d: in live state 2"),
        ({"b.weight": torch.ones(4101)}, r"b\.weight: shape \(4101,\) in live state"),
        ({"b.weight": torch.ones(4100, dtype=torch.int32)}, r"b\.weight: I32 in live state"),
        ({"steps": torch.tensor([3, 5])}, r"steps: I64 buffer"),
    ]:
        with pytest.raises(MismatchError, match=what.replace("state 2", "state")):
            running.add({**given[1], **change})
    missing = dict(given[1])
    del missing["c"]
    with pytest.raises(MismatchError, match=r"c: in .* but missing from live state"):
        running.add(missing)
    for value in (float("nan"), float("inf")):
        spoilt = {**given[1], "c": torch.tensor(value)}
        with pytest.raises(NonFiniteError, match="c: 1 NaN or infinite"):
            running.add(spoilt)
    with pytest.raises(RecipeError, match="float64"):
        running.add({**given[1], "b.weight": torch.ones(4100, dtype=torch.float64)})
    assert len(running.members) == 1
    assert same(dict(running.mean().tensors()), before)
    running.add(given[1])
    assert same(dict(running.mean().tensors()), soup_of(tmp_path, saved(tmp_path / "files", given)))


class Flattened(torch.Tensor):
    """As tensors of several devices and quantised ones are."""

    def __tensor_flatten__(self):
        return [], None


@pytest.mark.parametrize(
    ("value", "error", "what"),
    [
        (3.0, CheckpointError, "a float in"),
        ({"x": 1}, CheckpointError, "a dict in"),
        (np.ma.masked_array([1.0], [True]), CheckpointError, "a MaskedArray in"),
        (np.ones(3, ">f4"), UnsupportedDTypeError, ">f4"),
        (np.array(["x"]), UnsupportedDTypeError, "<U1"),
        (torch.ones(2, dtype=torch.complex128), UnsupportedDTypeError, "complex128"),
        (torch.ones(2, device="meta"), CheckpointError, "meta"),
        (torch.eye(2).to_sparse(), CheckpointError, "sparse"),
        (torch.ones(2).as_subclass(Flattened), CheckpointError, "Flattened"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(value, error, what):
    with pytest.raises(error, match=rf"^w: .*{what}"):
        streamsoup.RunningSoup({"w": value}, budget_bytes=BUDGET)


def test_what_is_no_ingredient_is_refused():
    running = streamsoup.RunningSoup(states(1)[0], budget_bytes=BUDGET)
    with pytest.raises(RecipeError, match="A int is no ingredient"):
        running.add(3)
    with pytest.raises(RecipeError, match="takes a path"):
        running.candidate(states(1)[0])


# -- what cannot be read again ---------------------------------------------------------------------------------------


def test_the_same_numbers_are_taken_out_again_and_others_are_not(tmp_path):
    given = states(dtype=torch.bfloat16)
    running = streamsoup.RunningSoup(given[0], budget_bytes=BUDGET)
    for state in given:
        running.add(state)
    running.remove(strided(given[1]))
    paths = saved(tmp_path / "files", given)
    assert same(dict(running.mean().tensors()), soup_of(tmp_path, [paths[i] for i in (0, 2, 3)]))
    with pytest.raises(RecipeError, match="none that was added"):
        running.remove({**given[0], "c": given[0]["c"] + 1})
    with pytest.raises(RecipeError, match="none that was added"):
        running.remove(given[1])
    with pytest.raises(RecipeError, match=r"live state 1, not on disk: cannot be read again\. Give its tensors"):
        running.remove("live state 1, not on disk")
    running.remove(given[0], 0.5)
    assert [m.weight for m in running.members] == [0.5, 1, 1]


def test_where_float64_keeps_a_trace_the_sum_says_so_and_is_within_its_bound(tmp_path):
    rng = np.random.default_rng(3)
    arrays = [(rng.standard_normal(5000) * 2.0 ** rng.integers(-40, 40, 5000)).astype(np.float32) for _ in range(4)]
    running = streamsoup.RunningSoup({"w": arrays[0]}, budget_bytes=BUDGET, dtype="float64")
    narrow = streamsoup.RunningSoup({"w": arrays[0]}, budget_bytes=BUDGET)
    for soup in (running, narrow):
        for array in arrays:
            soup.add({"w": array})
        assert not any("roundings" in note for note in soup.notes)
        soup.remove({"w": arrays[1]})
        assert not soup.mean().is_exact
        assert any("roundings" in note for note in soup.notes)
    exact = sum(a.astype(np.longdouble) for i, a in enumerate(arrays) if i != 1) / 3
    bound = 6 * 2.0**-53 * sum(abs(a.astype(np.float64)) for a in arrays) / 3
    found = narrow.mean().tensors()["w"].numpy()
    assert np.all(abs(found - exact) <= bound + np.spacing(abs(found)) / 2)
    assert any("not on disk" in note for note in running.notes)


def test_a_sum_that_a_failure_spoilt_says_that_it_cannot_be_made_anew(monkeypatch, tmp_path):
    given = states(3)
    spoilt = streamsoup.RunningSoup(given[0], budget_bytes=BUDGET).add(given[0])
    kept = streamsoup.RunningSoup(given[0], folder=tmp_path / "sums", budget_bytes=BUDGET).add(given[0])
    for running in (spoilt, kept):
        with monkeypatch.context() as patch:
            patch.setattr(running._store, "commit", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                running.add(given[1])
        assert len(running.members) == 1
    with pytest.raises(ResumeError, match=r"live state 1, not on disk: cannot be read again, which making .* anew"):
        spoilt.add(given[2])
    kept.add(given[2])
    paths = saved(tmp_path / "files", given)
    assert same(dict(kept.mean().tensors()), soup_of(tmp_path, [paths[0], paths[2]]))


def test_a_soup_of_live_states_is_saved_and_says_what_it_is(tmp_path):
    given = states(3)
    running = streamsoup.RunningSoup(given[0], budget_bytes=BUDGET, shard_bytes=5000)
    for state in given:
        running.add(state)
    paths = saved(tmp_path / "files", given)
    expected = soup_of(tmp_path, paths)
    assert running.mean().save(tmp_path / "soup") == tmp_path / "soup"
    assert same_bits(read_checkpoint(tmp_path / "soup"), {n: t.numpy() for n, t in expected.items()})
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert [i["path"] for i in manifest["ingredients"]] == [f"live state {i}, not on disk" for i in (1, 2, 3)]
    assert "kept nowhere" in manifest["notes"][0]
    assert not (tmp_path / "soup" / "recipe.yaml").exists()
    running.mean().save(tmp_path / "one.safetensors")
    assert same(load_file(tmp_path / "one.safetensors"), expected)
    with pytest.raises(DestinationError, match="exists already"):
        running.mean().save(tmp_path / "soup")
    running.add(given[0]).mean().save(tmp_path / "soup", overwrite=True)
    with pytest.raises(RecipeError, match="a recipe names files"):
        running.recipe()


def test_a_soup_of_files_is_saved_with_its_recipe(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 3)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET)
    for run in runs:
        running.add(run)
    running.mean().save(tmp_path / "soup")
    assert running.recipe().ingredients == tuple(streamsoup.Ingredient(run) for run in runs)
    recipe = streamsoup.read_recipe(tmp_path / "soup" / "recipe.yaml")
    assert [i.path for i in recipe.ingredients] == runs
    streamsoup.soup(runs, tmp_path / "again")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "again"))


def test_nothing_is_left_of_a_soup_that_could_not_be_saved(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path / "runs", 2)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET).add(runs[0])
    monkeypatch.setattr("streamsoup.saving.FileSink.write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        running.mean().save(tmp_path / "soup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_kept_sum_of_live_states_takes_a_module_to_go_on(tmp_path):
    given = states()
    running = streamsoup.RunningSoup(given[0], budget_bytes=BUDGET)
    running.add(given[0]).add(given[1]).save(tmp_path / "sums")
    with pytest.raises(ResumeError, match="Give a module or a checkpoint of the same network, as like="):
        streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET)
    with streamsoup.RunningSoup.open(tmp_path / "sums", like=given[2], budget_bytes=BUDGET) as again:
        assert again.members == running.members
        again.add(given[2]).remove(given[0])
        assert again.members[-1].path == "live state 3, not on disk"
        assert len(again.members) == 2
        paths = saved(tmp_path / "files", given)
        assert same(dict(again.mean().tensors()), soup_of(tmp_path, paths[1:3]))


def test_members_whose_files_are_gone_are_kept_when_asked(tmp_path):
    given = states(3)
    paths = saved(tmp_path / "files", given)
    with streamsoup.RunningSoup(paths, folder=tmp_path / "sums", budget_bytes=BUDGET) as running:
        running.add(paths[0]).add(paths[1])
    expected = soup_of(tmp_path, paths)
    (tmp_path / "files" / "run1.safetensors").unlink()
    with pytest.raises(StreamsoupError, match=r"run1\.safetensors"):
        streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET)
    with streamsoup.RunningSoup.open(tmp_path / "sums", gone="keep", budget_bytes=BUDGET) as again:
        again.add(paths[2])
        assert same(dict(again.mean().tensors()), expected)
        with pytest.raises(RecipeError, match="cannot be read again"):
            again.remove(paths[1])


def test_an_open_checkpoint_is_an_ingredient(tmp_path):
    from streamsoup.checkpoints import open_checkpoints

    runs = fine_tunes(tmp_path / "runs", 2)
    opened = open_checkpoints(runs)
    running = streamsoup.RunningSoup(opened[0], budget_bytes=BUDGET).add(opened[0]).add(opened[1])
    running.mean().write(tmp_path / "mean")
    streamsoup.soup(runs, tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "mean"), read_checkpoint(tmp_path / "soup"))


def test_buffers_are_those_of_the_first_state(tmp_path):
    given = states(2)
    given[1]["steps"] = torch.tensor([9, 9])
    other = {**given[0], "steps": torch.tensor([1, 1])}
    running = streamsoup.RunningSoup(other, budget_bytes=BUDGET, buffers="first").add(given[1]).add(given[0])
    assert running.mean().tensors()["steps"].tolist() == [9, 9]


def test_a_module_with_a_file_beside_it(tmp_path):
    file = str(
        write_checkpoint(tmp_path / "one", {"weight": np.ones((3, 2), np.float32), "bias": np.ones(3, np.float32)})
    )
    module = torch.nn.Linear(2, 3)
    running = streamsoup.RunningSoup(module, budget_bytes=BUDGET).add(file)
    assert torch.equal(running.mean().tensors()["weight"], torch.ones(3, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("only_grows", [True, False])
def test_states_on_a_gpu_are_folded_where_they_are(tmp_path, place, only_grows):
    given = states(3)
    options = {"device": "cuda", "sums": place, "only_grows": only_grows}
    running = streamsoup.RunningSoup(given[0], budget_bytes=BUDGET, **options)
    for state in (given[0], given[1], strided(given[2])):
        running.add({n: t.to("cuda") if t.is_contiguous() else strided({n: t.cuda()})[n] for n, t in state.items()})
    expected = soup_of(tmp_path, saved(tmp_path / "files", given))
    assert same(dict(running.mean().tensors()), expected)
    live = open_live({n: t.cuda() for n, t in given[0].items()}, "x")
    assert LiveSource(live).resident(0, 8, 16, torch.device("cuda:0")).data_ptr() == live.arrays[0].data_ptr() + 8


@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_memory_stays_under_the_budget_while_a_state_is_folded_in(tmp_path, kind):
    from streamsoup.budget import PeakSampler

    tensor = torch.randn(3000, 4000)  # 48 MB, and a sum of 96
    state = {"w": tensor if kind == "plain" else tensor.t().contiguous().t()}
    with streamsoup.RunningSoup(state, folder=tmp_path / "sums", budget_bytes="24MiB", workers=2) as running:
        running.add({"w": torch.zeros(3000, 4000)})  # imports, compiles
        with PeakSampler() as sampler:
            running.add(state)
        assert 0 < sampler.peak_bytes <= 24 << 20
        assert torch.equal(running.mean().tensors()["w"][:5], tensor[:5] / 2)


def test_rules_for_names_are_those_of_live_states_too(tmp_path):
    given = states(2)
    paths = saved(tmp_path / "files", given)
    running = streamsoup.RunningSoup(paths[0], budget_bytes=BUDGET, rename={r"^(.*)\.weight$": r"net.\1.weight"})
    running.add(paths[0]).add(given[1])
    found = dict(running.mean().tensors())
    expected = soup_of(tmp_path, paths)
    assert same({name.removeprefix("net."): tensor for name, tensor in found.items()}, expected)
    assert "net.a.weight" in found
    view = streamsoup.open([paths[0], given[1]], rename={"^a": "net.a"})
    assert torch.equal(view["net.a.weight"], expected["a.weight"])


LIKES = {
    "shape": {"w": torch.zeros(6, 4), "v": torch.zeros(5)},
    "fewer elements": {"w": torch.zeros(3), "v": torch.zeros(5)},
    "fewer tensors": {"w": torch.zeros(4, 6)},
    "more tensors": {"w": torch.zeros(4, 6), "v": torch.zeros(5), "x": torch.zeros(2)},
    "another name": {"w": torch.zeros(4, 6), "u": torch.zeros(5)},
    "no float": {"w": torch.zeros(4, 6, dtype=torch.int32), "v": torch.zeros(5)},
    "float64": {"w": torch.zeros(4, 6, dtype=torch.float64), "v": torch.zeros(5, dtype=torch.float64)},
}


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
def test_a_kept_sum_is_not_taken_for_that_of_another_network(tmp_path, like):
    state = {"w": torch.arange(24.0).view(4, 6), "v": torch.ones(5)}
    with streamsoup.RunningSoup(state, folder=tmp_path / "sum", budget_bytes=BUDGET) as running:
        running.add(state)
    with pytest.raises(ResumeError, match="other names, shapes or order"):
        streamsoup.RunningSoup.open(tmp_path / "sum", like=like, budget_bytes=BUDGET)
    with streamsoup.RunningSoup.open(tmp_path / "sum", like=state, budget_bytes=BUDGET) as running:
        assert same(running.mean().tensors(), state)


@pytest.mark.parametrize("names", [("w", "v"), ("w:0", "v:0")])
def test_a_kept_sum_reopened_in_another_order_is_right_or_refused(tmp_path, names):
    """Names that are no plain paths are arrays by number."""
    state = {names[0]: torch.ones(4), names[1]: torch.full((4,), 2.0)}
    with streamsoup.RunningSoup(state, folder=tmp_path / "sum", budget_bytes=BUDGET) as running:
        running.add(state)
    other = dict(reversed(state.items()))
    if ":" in names[0]:
        with pytest.raises(ResumeError, match="order"):
            streamsoup.RunningSoup.open(tmp_path / "sum", like=other, budget_bytes=BUDGET)
    else:
        with streamsoup.RunningSoup.open(tmp_path / "sum", like=other, budget_bytes=BUDGET) as running:
            assert same(running.mean().tensors(), state)


def test_one_live_state_gives_names_and_dtypes():
    state = {"w": torch.ones(4)}
    with pytest.raises(RecipeError, match="Give one live state"):
        streamsoup.RunningSoup([state, {"w": torch.ones(4, dtype=torch.float16)}], budget_bytes=BUDGET)


def test_a_sum_of_nothing_that_is_averaged():
    running = streamsoup.RunningSoup({"n": torch.tensor(3)}, budget_bytes=BUDGET)
    assert running.add({"n": torch.tensor(3)}).mean().tensors()["n"] == 3


def test_what_is_left_out_is_listed_once():
    state = {"w": torch.ones(4)}
    running = streamsoup.RunningSoup(state, only_shared=True, budget_bytes=BUDGET)
    for _ in range(5):
        running.add({**state, "z": torch.ones(3)})
    assert [one.names for one in running.pool.left_out] == [("z",)]
