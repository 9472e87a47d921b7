"""Files of torch.save: the soups of the equal safetensors files, and one sentence for what cannot be read."""

from __future__ import annotations

import argparse
import collections
import json
import os

import numpy as np
import pytest
import torch
from factory import same_bits, write_checkpoint
from torch_checkpoints import (
    TORCH,
    expected,
    held,
    open_one,
    refused,
    save,
    sharded,
    some_strided,
    some_tensors,
    soup_of,
    to_numpy,
)

import streamsoup
from streamsoup.checkpoints import DerivedCheckpoint, StoredCheckpoint, nested
from streamsoup.checkpoints.torch_file import open_torch_file
from streamsoup.errors import (
    ShardIndexError,
    UnsupportedDTypeError,
)
from streamsoup.windows import Windows

MODES = ("map", "ahead", "plain")


class Net(torch.nn.Linear):
    pass


@pytest.mark.parametrize("dtype", TORCH)
def test_every_dtype_has_the_bytes_that_torch_saved(tmp_path, dtype):
    tensors = {"a": torch.arange(48).reshape(6, 8).to(TORCH[dtype]), "b": torch.ones(3, dtype=TORCH[dtype])}
    checkpoint = open_one(save(tmp_path / "run.pt", tensors))
    assert isinstance(checkpoint, StoredCheckpoint)
    assert held(checkpoint) == expected(tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_pickle_protocol(tmp_path, protocol):
    tensors = some_tensors(0)
    assert held(open_one(save(tmp_path / "run.pt", tensors, pickle_protocol=protocol))) == expected(tensors)


@pytest.mark.parametrize("read_mode", MODES)
@pytest.mark.parametrize("make", [some_tensors, some_strided])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_soup_has_the_bits_of_the_safetensors_files(tmp_path, make, read_mode, dtype, monkeypatch):
    files, folders = [], []
    for i in range(3):
        tensors = make(i, dtype)
        files.append(save(tmp_path / f"run{i}.pt", {"state_dict": tensors, "epoch": i}))
        folders.append(write_checkpoint(tmp_path / f"run{i}", to_numpy(tensors)))
    wanted = soup_of(tmp_path, folders, "wanted")
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    assert same_bits(soup_of(tmp_path, files, "found", read_mode=read_mode, workers=3), wanted)
    mixed = [folders[0], files[1], folders[2]]
    assert same_bits(soup_of(tmp_path, mixed, "mixed", read_mode=read_mode), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_strided_tensors_are_what_torch_sees(tmp_path, mode):
    tensors = some_strided(3, "F16")
    checkpoint = open_one(save(tmp_path / "run.pth", tensors))
    assert isinstance(checkpoint, DerivedCheckpoint)
    assert held(checkpoint, mode) == expected(tensors)


def test_what_lies_in_order_is_read_in_place(tmp_path):
    """A slice of rows, a dimension of size 1 with a stride of its own, a view, a tied weight."""
    base = torch.randn(10, 6)
    tensors = {"base": base, "rows": base[2:5], "one": base[3:4].t().t(), "view": base.view(-1), "tied": base}
    checkpoint = open_one(save(tmp_path / "run.pt", tensors))
    assert isinstance(checkpoint, StoredCheckpoint)
    assert held(checkpoint) == expected(tensors)
    assert same_bits(soup_of(tmp_path, [checkpoint.path], "soup"), to_numpy(tensors))


def test_parameters_buffers_and_attributes(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[0].weight.note = "an attribute"
    tensors = dict(module.state_dict(keep_vars=True))
    plain = torch.randn(5)
    plain.note = {"more": 1}
    tensors |= {"noted": plain, "buffer": torch.nn.Buffer(torch.randn(4))}
    assert held(open_one(save(tmp_path / "run.pt", tensors))) == expected(tensors)


@pytest.mark.parametrize("key", [None, "state_dict", "."])
def test_where_the_model_is(tmp_path, key):
    tensors = some_tensors(0)
    document = {
        "state_dict": tensors,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "args": argparse.Namespace(lr=0.1),
        "best": torch.tensor(0.5),
        "rng": torch.get_rng_state(),
    }
    path = save(tmp_path / "run.ckpt", document)
    names = set(open_torch_file(path, key).table.names)
    if key == ".":
        assert names == {*(f"state_dict.{name}" for name in tensors), "optimizer.state.0.exp_avg", "best", "rng"}
    else:
        assert names == set(tensors)


def test_nested_models_are_named_with_dots(tmp_path):
    tensors = {"encoder": {"a": torch.ones(2), "deep": {"b": torch.zeros(3)}}, "head.w": torch.ones(1)}
    path = save(tmp_path / "run.pt", {"app": {"model": tensors, "optim": {"x": torch.ones(1)}}})
    assert set(open_one(path).table.names) == {"encoder.a", "encoder.deep.b", "head.w"}
    assert set(open_torch_file(path, "app.model.encoder").table.names) == {"a", "deep.b"}
    assert set(open_torch_file(path, "app.optim").table.names) == {"x"}


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"model": {"state_dict": {"a": torch.ones(1)}}}, {"a"}),
        ({"model": {"net": {"a": torch.ones(1)}}}, {"net.a"}),
        ({"model": {"net": {"a": torch.ones(1)}, "head": {"b": torch.ones(1)}}}, {"net.a", "head.b"}),
        ({"module": {0: {"a": torch.ones(1)}}, "epoch": 3}, {"0.a"}),
    ],
)
def test_blocks_of_a_model_are_parts_of_names(tmp_path, document, names):
    assert set(open_one(save(tmp_path / "run.pt", document)).table.names) == names


@pytest.mark.parametrize("wrappers", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_before_all_names_is_left_out(tmp_path, wrappers):
    tensors = some_tensors(0)
    path = save(tmp_path / "run.pt", {wrappers + name: tensor for name, tensor in tensors.items()})
    assert set(open_one(path).table.names) == set(tensors)
    some = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert set(open_one(save(tmp_path / "some.pt", some)).table.names) == set(some)


def test_what_is_plainly_no_tensor_is_passed_over(tmp_path):
    module = torch.nn.Linear(2, 2)
    state = module.state_dict()  # an OrderedDict with an attribute, _metadata
    state["steps"], state["nothing"], state["name"], state["list"] = 3, None, "x", [1, 2.0]
    state["layer._extra_state"] = {"version": 1, "recipe": argparse.Namespace(a=1)}
    assert set(open_one(save(tmp_path / "run.pt", state)).table.names) == {"weight", "bias"}


def test_the_model_must_be_clear(tmp_path):
    two = {"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}
    refused(save(tmp_path / "two.pt", two), r"has 'model', 'ema' at its top, .* --key")
    assert held(open_torch_file(str(tmp_path / "two.pt"), "ema")) == expected(two["ema"])
    other = {"student": {"a": torch.ones(1)}, "epoch": 1}
    refused(save(tmp_path / "other.pt", other), r"has 'student' at its top, .* --key")
    flat = {"w": torch.ones(1), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    refused(save(tmp_path / "flat.pt", flat), r"has tensors such as 'w', 'optimizer' at its top, .* --key")
    both = {"model": {"a": torch.ones(1)}, "head.bias": torch.ones(2)}
    refused(save(tmp_path / "both.pt", both), r"has tensors such as 'head.bias', 'model' at its top, .* --key")
    refused(tmp_path / "two.pt", r"nothing under key 'teacher'. Its mappings are: model, ema", key="teacher")
    refused(tmp_path / "two.pt", r"nothing under key 'model.b'", key="model.b")
    refused(tmp_path / "other.pt", r"holds a int under key 'epoch'", key="epoch")


class Mapped(dict):
    pass


class Reduced:
    def __init__(self, kind, arguments):
        self.made = (kind, arguments)

    def __reduce__(self):
        return self.made


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Mapped(weight=ONE), "Mapped"),
        (collections.deque([ONE]), "deque"),
        (collections.Counter({"weight": ONE}), "Counter"),
        (Reduced(collections.OrderedDict, ([("weight", ONE)],)), "OrderedDict"),
        (Reduced(dict, ({"weight": ONE},)), "dict"),
        (Reduced(collections.defaultdict, (dict, {"weight": ONE})), "defaultdict"),
        ([np.ones(3)], "list with tensors"),
    ],
)
def test_what_a_class_would_make_of_tensors_is_not_dropped(tmp_path, value, what):
    refused(save(tmp_path / "flat.pt", {"a.weight": ONE, "b": value}), rf"b: is no tensor in .*, but .*{what}")
    refused(save(tmp_path / "in.pt", {"model": {"a": ONE, "b": value}}), rf"b: is no tensor in .*, but .*{what}")


@pytest.mark.parametrize("name", ["head", "student", "ema", "best_model", "logit_scale", "optimal", "prompts"])
@pytest.mark.parametrize("value", [ONE, {"weight": ONE}, Mapped(weight=ONE), [ONE]])
def test_what_may_belong_to_the_model_is_not_left_out_beside_it(tmp_path, name, value):
    path = save(tmp_path / "run.pt", {"model": {"a": ONE}, name: value})
    refused(path, rf"has .*'{name}'.* at its top, and it is not clear which is the model\. .* --key")
    assert open_torch_file(path, "model").table.names == ("a",)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "optimizer",
            "optimizer_states",
            "optim_g",
            "optimizer_state_dict",
            "lr_scheduler",
            "schedulers",
            "callbacks",
        ),
        *(
            "grad_scaler",
            "amp_scaler",
            "loops",
            "rng_state",
            "cuda_rng_states",
            "random_states_0",
            "last_optimizer_state",
        ),
    ],
)
@pytest.mark.parametrize("value", [{"x": {0: ONE}}, [ONE], Mapped(x=ONE)])
def test_the_state_of_training_is_left_out(tmp_path, name, value):
    beside = {"best_loss": ONE, "global_step": ONE, "losses": [ONE], "val_acc": ONE, "rng": ONE}
    path = save(tmp_path / "run.pt", {"model": {"a": ONE}, name: value, **beside})
    assert open_torch_file(path).table.names == ("a",)


def test_a_model_of_nothing_but_lists_is_refused(tmp_path):
    refused(save(tmp_path / "run.pt", {"model": {"a": [ONE]}}), "a: is no tensor in .*, but list with tensors")


@pytest.mark.parametrize("key", [b"w", ("a", "b"), None, 1.5, True, Net])
@pytest.mark.parametrize("value", [ONE, {"a": ONE}, [ONE]])
def test_keys_that_are_no_text_name_no_tensors(tmp_path, key, value):
    refused(save(tmp_path / "flat.pt", {"a": ONE, key: value}), "a tensor has a key that is no text", key=".")
    refused(save(tmp_path / "in.pt", {"model": {"a": {key: value}}}), "a tensor under a has a key that is no text")
    path = save(tmp_path / "other.pt", {"a": ONE, "labels": {key: 3}, 7: ONE})
    assert open_torch_file(path).table.names == ("a", "7")


def test_values_that_are_there_many_times_are_no_bomb(tmp_path, monkeypatch):
    many = {"a": torch.ones(1)}
    for _ in range(70):
        many = {"x": many, "y": many}
    refused(save(tmp_path / "deep.pt", {"model": many}), "nested too deeply")
    itself: dict = {"a": torch.ones(1)}
    itself["b"] = itself
    refused(save(tmp_path / "self.pt", {"model": itself}), "nested too deeply")
    wide: dict = {}
    for _ in range(40):
        wide = {"x": wide, "y": wide}
    monkeypatch.setattr(nested, "_MAX_NODES", 10_000)
    refused(save(tmp_path / "wide.pt", {"model": {"w": torch.ones(1), "x": wide}}), "more than 10,000 values")
    monkeypatch.setattr(nested, "_MAX_NAMES_BYTES", 1000)
    refused(save(tmp_path / "long.pt", {"x" * 1001: torch.ones(1)}), "names of megabytes")


def test_what_is_no_state_dict_is_refused(tmp_path):
    refused(save(tmp_path / "a.pt", {}), "holds no tensors")
    refused(save(tmp_path / "b.pt", {"epoch": 3}), "holds no tensors")
    refused(save(tmp_path / "c.pt", torch.ones(3)), r"one object \(torch._utils._rebuild_tensor_v2\), not a mapping")
    refused(save(tmp_path / "d.pt", [torch.ones(3)]), "holds one list, not a mapping")
    refused(save(tmp_path / "e.pt", Net(2, 2)), r"one object \(.*Net\).* state_dict")
    refused(save(tmp_path / "f.pt", {"model": Net(2, 2)}), r"under 'model' an object \(.*Net\)")
    refused(save(tmp_path / "g.pt", {"model": Net(2, 2)}), r"an object \(.*Net\) under key 'model'", key="model")
    refused(save(tmp_path / "h.pt", {"a": torch.ones(1), "b": Net(2, 2)}), r"b: is no tensor in .*Net")
    refused(save(tmp_path / "i.pt", {"a": torch.ones(1), "b": [torch.ones(1)]}), "b: is no tensor in .*, but list")
    refused(save(tmp_path / "j.pt", {"a": torch.ones(1), "b": np.ones(3)}), r"b: is no tensor in .*numpy")
    refused(save(tmp_path / "k.pt", {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}), "a.b: stands for two", key=".")
    refused(save(tmp_path / "l.pt", {"\ud800": torch.ones(1)}), "not valid Unicode")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested|of torch"),
        (lambda: torch.ones(3, device="meta"), "without data"),
        (lambda: torch.ones(3, dtype=torch.complex128), "of torch.ComplexDouble"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "a conjugate"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path, make, words):
    path = save(tmp_path / "run.pt", {"a": torch.ones(1), "layer.w": make()})
    refused(path, rf"^layer\.w: is ({words})", UnsupportedDTypeError)


@pytest.mark.parametrize("turn", [lambda t: t, lambda t: t.t().contiguous().t()])
def test_8_bit_floats_are_multiplied_by_their_scales(tmp_path, turn):
    weight = torch.randn(256, 128).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale_inv": torch.rand(2, 1), "b": torch.randn(3).bfloat16()}
    plain = write_checkpoint(tmp_path / "plain", to_numpy(tensors))
    path = save(tmp_path / "run.pt", {**tensors, "a.weight": turn(weight)})
    wanted = soup_of(tmp_path, [plain], "wanted")
    assert set(wanted) == {"a.weight", "b"}
    assert same_bits(soup_of(tmp_path, [path], "found"), wanted)


class Call:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_nothing_in_a_file_is_run(tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {"a": torch.ones(1), **({"b": Call()} if place == "inside" else {})}
    path = save(tmp_path / "run.pt", {"state_dict": tensors, "extra": Call() if place == "beside" else 0})
    refused(path, r"wants to use posix\.system when it is loaded")
    assert not (tmp_path / "hacked").exists()


# -- folders -------------------------------------------------------------------------------------------------------


def test_folders_as_transformers_wrote_them(tmp_path):
    tensors = [some_tensors(i) for i in range(2)]
    save(tmp_path / "a" / "pytorch_model.bin", tensors[0])
    (tmp_path / "a" / "config.json").write_text('{"hidden_size": 3}')
    torch.save({"x": 1}, tmp_path / "a" / "optimizer.bin")
    sharded(tmp_path / "b", tensors[1])
    plain = [write_checkpoint(tmp_path / f"plain{i}", to_numpy(t)) for i, t in enumerate(tensors)]
    found = soup_of(tmp_path, [tmp_path / "a", tmp_path / "b"], "soup")
    assert same_bits(found, soup_of(tmp_path, plain, "wanted"))
    assert json.loads((tmp_path / "soup" / "config.json").read_text()) == {"hidden_size": 3}
    assert len(open_one(tmp_path / "b").shards) == 2


def test_safetensors_win(tmp_path):
    save(tmp_path / "run" / "pytorch_model.bin", {"old": torch.ones(1)})
    write_checkpoint(tmp_path / "run", {"new": np.ones(1, np.float32)})
    assert open_one(tmp_path / "run").table.names == ("new",)


def test_an_index_that_lies_is_refused(tmp_path):
    with pytest.raises(ShardIndexError, match=r"^one: stored in .*00002.* but the index says .*00001"):
        open_one(sharded(tmp_path / "a", some_tensors(0), {"one": "pytorch_model-00001-of-00002.bin"}))
    with pytest.raises(ShardIndexError, match=r"^more: the index of"):
        open_one(sharded(tmp_path / "b", some_tensors(0), {"more": "pytorch_model-00001-of-00002.bin"}))
    with pytest.raises(ShardIndexError, match="outside the folder"):
        open_one(sharded(tmp_path / "c", some_tensors(0), {"more": "../a/pytorch_model-00001-of-00002.bin"}))
    sharded(tmp_path / "d", some_tensors(0))
    (tmp_path / "d" / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ShardIndexError, match=r"2 \.bin files but no index"):
        open_one(tmp_path / "d")


def test_what_lies_between_tensors_is_dropped_with_them(tmp_path, monkeypatch):
    """Windows count down what is still to be used of them; entries' headers never would be."""
    dropped = []

    class Noted(Windows):
        def drop(self, offset, nbytes):
            dropped.append((offset, nbytes))
            super().drop(offset, nbytes)

    monkeypatch.setattr("streamsoup.read.Windows", Noted)
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    path = save(tmp_path / "run.pt", some_tensors(0))
    streamsoup.soup([path], tmp_path / "soup", read_mode="ahead")
    table = open_one(path).table
    last = max(range(len(table)), key=lambda t: table.begins[t] + table.nbytes[t])
    assert sum(nbytes for _, nbytes in dropped) == table.begins[last] + table.nbytes[last] - table.begins.min()
