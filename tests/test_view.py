"""A soup as a mapping: the bits of the written one, read no further than was asked for."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from factory import DTYPES, any_bits, fine_tunes, read_checkpoint, same_bits, write_checkpoint

import streamsoup
from streamsoup.checkpoints import open_checkpoints
from streamsoup.cook import cook
from streamsoup.errors import (
    ChangedIngredientError,
    CheckpointNotFoundError,
    MismatchError,
    NonFiniteError,
    RecipeError,
    StreamsoupError,
    UnsupportedDTypeError,
)
from streamsoup.methods import Coefficients
from streamsoup.methods.base import MethodBase
from streamsoup.read import MappedSource

SHAPES = {"a.weight": (50, 70), "b": (9001,), "c": (), "d": (7, 3, 11), "empty": (0, 4)}


def checkpoints(folder, count=3, dtype="F32", **options):
    paths = []
    for i in range(count):
        rng = np.random.default_rng(i)
        tensors = {n: np.asarray(rng.standard_normal(s)).astype(DTYPES[dtype]) for n, s in SHAPES.items()}
        tensors["steps"] = np.array([[1, 2], [3, 4]])
        paths.append(str(write_checkpoint(folder / f"run{i}", tensors, shards=2, pad=1 + i, **options)))
    return paths


def arrays(view):
    """All tensors, as a file would have them."""
    kinds = {torch.bfloat16: torch.int16}
    found = {}
    for name in view:
        tensor = view[name]
        raw = tensor.view(kinds.get(tensor.dtype, tensor.dtype)).numpy()
        found[name] = raw.view(DTYPES["BF16"]) if tensor.dtype == torch.bfloat16 else raw
    return found


def written(tmp_path, paths, **options):
    streamsoup.soup(paths, tmp_path / "written", overwrite=True, **options)
    return read_checkpoint(tmp_path / "written")


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_lookups_have_the_bits_of_the_file(tmp_path, dtype, device, read_mode):
    paths = checkpoints(tmp_path, dtype=dtype)
    options = {"weights": [1, 2, 0.5]}
    with streamsoup.open(paths, device=device, read_mode=read_mode, **options) as view:
        assert same_bits(arrays(view), written(tmp_path, paths, **options))


@pytest.mark.parametrize("method", ["linear", "ties", "karcher", "model_stock", "della", "sce"])
def test_methods_that_look_first(tmp_path, method):
    paths = checkpoints(tmp_path, 4)
    options = {"method": method, "base": None if method in ("linear", "karcher") else paths.pop(0)}
    view = streamsoup.open(paths, budget_bytes="24MiB", **options)
    expected = written(tmp_path, paths, **options)
    assert same_bits(arrays(view), expected)
    assert np.array_equal(view.slice("a.weight")[11:13, 2:].numpy(), expected["a.weight"][11:13, 2:])


def test_one_checkpoint_is_itself_whatever_its_dtypes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: any_bits(rng, name, (5, 7)) for name in ("BF16", "F16", "F32", "F64", "I64", "BOOL", "U16")}
    tensors["BOOL"] = rng.random((5, 7)) < 0.5
    tensors["C64"] = rng.standard_normal((5, 7)).astype(np.complex64)
    path = write_checkpoint(tmp_path / "one.safetensors", tensors)
    view = streamsoup.open(path)
    assert same_bits(arrays(view), tensors)
    assert view.dtype("BF16") is torch.bfloat16


def test_a_recipe_and_its_file(tmp_path):
    paths = checkpoints(tmp_path)
    recipe = streamsoup.Recipe(tuple(streamsoup.Ingredient(p, w) for p, w in zip(paths, (3, 1, 1), strict=True)))
    cook(recipe, tmp_path / "soup", streamsoup.Execution())
    expected = read_checkpoint(tmp_path / "soup")
    assert same_bits(arrays(streamsoup.open(recipe)), expected)
    assert same_bits(arrays(streamsoup.open(tmp_path / "soup" / "recipe.yaml")), expected)
    for more in ({"weights": [1, 1, 1]}, {"method": "ties"}, {"dtype": "bfloat16"}):
        with pytest.raises(RecipeError, match=f"^{next(iter(more))}: is the recipe's to say"):
            streamsoup.open(recipe, **more)


def test_patterns_checkpoints_and_live_tensors(tmp_path):
    paths = checkpoints(tmp_path)
    expected = written(tmp_path, paths)
    assert same_bits(arrays(streamsoup.open(str(tmp_path / "run*"))), expected)
    opened = open_checkpoints(paths[1:2])
    live = {n: torch.from_numpy(a.copy()) for n, a in read_checkpoint(tmp_path / "run2").items()}
    assert same_bits(arrays(streamsoup.open([paths[0], *opened, live])), expected)
    with pytest.raises(RecipeError, match="A int is no ingredient"):
        streamsoup.open([3])
    with pytest.raises(RecipeError, match="sauce"):
        streamsoup.open(paths, sauce="hot")


# -- no more than was asked for --------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Bytes that were fetched, by position."""
    found = Counter()
    fetch = MappedSource.fetch

    def counted(self, position, offset, nbytes, staging):
        found[self._table.names[position]] += nbytes
        return fetch(self, position, offset, nbytes, staging)

    monkeypatch.setattr(MappedSource, "fetch", counted)
    return found


def test_names_shapes_and_dtypes_take_no_reading(tmp_path, reads):
    view = streamsoup.open(checkpoints(tmp_path), dtype="bfloat16")
    assert list(view) == list(view.keys())
    assert {*view} == {*SHAPES, "steps"}
    assert len(view) == 6
    assert "b" in view
    assert "nothing" not in view
    assert "b" in view.keys()  # noqa: SIM118 - that of the keys is another method
    assert {n: view.shape(n) for n in SHAPES} == SHAPES
    assert view.dtype("b") is torch.bfloat16
    assert view.dtype("steps") is torch.int64
    assert view.slice("b").dtype is torch.bfloat16
    assert len(view.slice("a.weight")) == 50
    assert not reads
    with pytest.raises(KeyError):
        view["nothing"]


def test_a_lookup_reads_its_tensor_and_a_slice_its_rows(tmp_path, reads):
    view = streamsoup.open(checkpoints(tmp_path), read_mode="map")
    view["b"]
    assert reads == {"b": 3 * 9001 * 4}
    view.slice("a.weight")[10:20, 3]
    view.slice("d")[-1]
    assert reads == {"b": 3 * 9001 * 4, "a.weight": 3 * 10 * 70 * 4, "d": 3 * 33 * 4}
    view.slice("steps")[1]
    assert reads["steps"] == 3 * 16


INDICES = [
    0, -1, 49, slice(None), slice(10, 20), slice(-3, None), slice(5, 5), slice(20, 10), slice(1, 40, 7), ...,
    (slice(10, 20), slice(None, 5)), (3, 4), (slice(2, 4), ..., 0), (slice(0, 3), None), (..., 2), None, [3, 1], (),
    torch.tensor([1, 5]), np.int64(7), torch.tensor(7), slice(0, 1000),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_slices_are_those_of_the_tensor(tmp_path, device, dtype):
    view = streamsoup.open(checkpoints(tmp_path, dtype=dtype), device=device)
    for name in ("a.weight", "d"):
        whole = view[name]
        for index in INDICES:
            try:
                expected = whole[index]
            except (IndexError, TypeError):
                continue
            found = view.slice(name)[index]
            assert found.shape == expected.shape, index
            assert torch.equal(found, expected), index
    assert torch.equal(view.slice("c")[()], view["c"])
    assert view.slice("empty")[0:0].shape == (0, 4)
    with pytest.raises(IndexError, match=r"a\.weight: row 50 of 50"):
        view.slice("a.weight")[50]
    with pytest.raises(ValueError, match="step -1"):
        view.slice("a.weight")[::-1]
    with pytest.raises(TypeError, match="no rows"):
        len(view.slice("c"))


# -- as other programs use it ----------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 5)
        self.norm = torch.nn.BatchNorm1d(5)


def test_torch_loads_it_as_a_state_dict(tmp_path):
    paths = []
    for i in range(3):
        state = {n: t.numpy().copy() + np.asarray(i, t.numpy().dtype) for n, t in Net().state_dict().items()}
        state["norm.num_batches_tracked"] = np.asarray(4)
        paths.append(str(write_checkpoint(tmp_path / f"{i}.safetensors", state)))
    view = streamsoup.open(paths)
    one, other = Net(), Net()
    one.load_state_dict(view)
    view.load_into(other)
    for name, tensor in dict(view).items():
        assert torch.equal(one.state_dict()[name], tensor)
        assert torch.equal(other.state_dict()[name], tensor)
    with pytest.raises(MismatchError):
        view.load_into(torch.nn.Linear(2, 2))


def test_what_is_made_is_nobody_elses(tmp_path):
    view = streamsoup.open(checkpoints(tmp_path))
    one = view["b"]
    one.zero_()
    assert view["b"].any()
    view.close()
    assert not one.any()
    with pytest.raises(StreamsoupError, match="closed"):
        view["b"]


def test_threads_may_share_it(tmp_path):
    view = streamsoup.open(checkpoints(tmp_path), method="ties", base=checkpoints(tmp_path / "more", 1)[0])
    expected = {name: view[name] for name in view}
    wrong = []

    def look():
        for name in [*view] * 3:
            if not torch.equal(view[name], expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_plans_within_the_budget(tmp_path):
    view = streamsoup.open(checkpoints(tmp_path), budget_bytes="20MiB", read_mode="plain")
    assert view.plan.projected_peak_bytes <= 20 << 20
    with pytest.raises(MemoryError):
        streamsoup.open(checkpoints(tmp_path / "more"), budget_bytes="1kB")


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_an_error_where_it_is_looked_at(tmp_path, caplog):
    paths = checkpoints(tmp_path)
    tensors = read_checkpoint(tmp_path / "run1")
    tensors["a.weight"] = tensors["a.weight"].copy()
    tensors["a.weight"][30, 2] = np.nan
    write_checkpoint(tmp_path / "run1", tensors, shards=2)
    view = streamsoup.open(paths)
    assert torch.isfinite(view["b"]).all()
    assert torch.isfinite(view.slice("a.weight")[:30]).all()
    for look in (lambda: view["a.weight"], lambda: view.slice("a.weight")[30], lambda: dict(view)):
        with pytest.raises(NonFiniteError, match=r"a\.weight: 1 NaN or infinite element\(s\) in .*run1"):
            look()
    with caplog.at_level(logging.WARNING, "streamsoup"):
        found = streamsoup.open(paths, nonfinite="warn")["a.weight"]
    assert found.isnan().sum() == 1
    assert "run1" in caplog.text


def test_buffers_that_differ(tmp_path):
    paths = checkpoints(tmp_path, 2)
    tensors = read_checkpoint(tmp_path / "run1") | {"steps": np.array([[1, 2], [3, 5]])}
    write_checkpoint(tmp_path / "run1", tensors, shards=2)
    with pytest.raises(MismatchError, match="steps: I64 buffer"):
        streamsoup.open(paths)["steps"]
    assert streamsoup.open(paths, buffers="first")["steps"].tolist() == [[1, 2], [3, 4]]


def test_an_ingredient_that_changes_under_it_is_noticed(tmp_path):
    paths = checkpoints(tmp_path, 2)
    view = streamsoup.open(paths)
    view["b"]
    for file in (tmp_path / "run1").glob("*.safetensors"):
        os.utime(file, ns=(1, 1))
    with pytest.raises(ChangedIngredientError, match="run1"):
        view["b"]
    with pytest.raises(CheckpointNotFoundError):
        streamsoup.open(tmp_path / "nothing")


def test_a_dtype_that_torch_does_not_have(tmp_path):
    from factory import entry, raw_file

    path = tmp_path / "packed.safetensors"
    path.write_bytes(raw_file({"w": entry("F6_E2M3", (4,), 0, 3)}, b"abc"))
    view = streamsoup.open(path)
    with pytest.raises(UnsupportedDTypeError, match=r"w: F6_E2M3 in .*packed"):
        view["w"]


# -- a method of one's own, and saving -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastLayers(MethodBase):
    """The first checkpoint, but the last one's where the name says so."""

    pattern: str
    name = "last_layers"
    fixed = True

    def merge(self, tensor, known):
        return Coefficients((0.0, 0.0, 1.0) if self.pattern in tensor.name else (1.0, 0.0, 0.0))


def test_a_method_of_ones_own(tmp_path):
    import json

    paths = checkpoints(tmp_path)
    view = streamsoup.open(paths, method=LastLayers("a."))
    first, last = read_checkpoint(tmp_path / "run0"), read_checkpoint(tmp_path / "run2")
    expected = {**first, "a.weight": last["a.weight"]}
    assert same_bits(arrays(view), expected)
    view.save(tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), expected)
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert manifest["method"] == "last_layers"
    assert manifest["notes"] == ["Combined by LastLayers(pattern='a.'), a method that no recipe names."]
    assert not (tmp_path / "soup" / "recipe.yaml").exists()


def test_a_saved_view_is_the_soup(tmp_path):
    paths = fine_tunes(tmp_path, 3, companions={"config.json": '{"dtype": "bfloat16"}'})
    streamsoup.open(paths, weights=[1, 2, 3], dtype="float32").save(tmp_path / "saved")
    streamsoup.soup(paths, tmp_path / "soup", weights=[1, 2, 3], dtype="float32")
    saved, soup = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("saved", "soup"))
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert saved[name] == soup[name], name
