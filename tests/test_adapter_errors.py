"""Adapters that do not fit, or mean more than W + s·B·A, are refused in one sentence that names what is at fault."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from adapter_pools import PREFIX, write_adapter, write_base, write_files
from factory import DTYPES, read_checkpoint, same_bits, write_checkpoint
from safetensors.torch import load_file

import streamsoup
from streamsoup.checkpoints import adapter_notes, open_checkpoints, open_live
from streamsoup.errors import CheckpointError, MismatchError, StreamsoupError

A, B = f"{PREFIX}layers.0.q.lora_A.weight", f"{PREFIX}layers.0.q.lora_B.weight"


def zeros(*shape, dtype="F32"):
    return np.zeros(shape, DTYPES[dtype])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    write_base(folder)
    return folder


def refusal(base, adapter):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints([f"{base}+{adapter}"])
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_adapters_of_torch_in_pieces_are_adapters_too(tmp_path, base):
    """A transposed factor makes a checkpoint that is put together, which is no reason to look away."""
    for name, alpha in (("one", 8), ("two", 64)):
        folder = tmp_path / name
        write_adapter(folder)
        (file,) = folder.glob("*.safetensors")
        tensors = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in load_file(file).items()}
        torch.save(tensors, folder / "adapter_model.bin")
        file.unlink()
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    with pytest.raises(MismatchError, match="lora_alpha is 64, but 8"):
        streamsoup.soup([one, two], tmp_path / "soup")
    result = streamsoup.soup([one, one], tmp_path / "soup")
    assert any("adapters" in note for note in result.notes)
    write_adapter(tmp_path / "stored")
    config = json.loads((tmp_path / "stored" / "adapter_config.json").read_text())
    (tmp_path / "stored" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    for name in ("stored", "one"):
        streamsoup.soup([f"{base}+{tmp_path / name}"], tmp_path / f"on-base-{name}")
    assert same_bits(read_checkpoint(tmp_path / "on-base-one"), read_checkpoint(tmp_path / "on-base-stored"))


def test_a_pattern_that_may_take_for_ever_is_refused(tmp_path, base):
    write_adapter(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rank_pattern": {"(a+)+": 4}}))
    assert "may take for ever" in refusal(base, tmp_path / "lora")
    path.write_text(json.dumps({**config, "rank_pattern": {r".*\.layers\.(1|2)\.[qk]": 4}}))
    open_checkpoints([f"{base}+{tmp_path / 'lora'}"])


PAIR = {A: (4, 70), B: (48, 4)}
TENSORS = {
    "a without b": ({A: (4, 70)}, "has .*q.lora_A.weight but no lora_B of the same module"),
    "b without a": ({B: (48, 4)}, "has .*q.lora_B.weight but no lora_A"),
    "no module in the base": (
        {f"{PREFIX}layers.7.q.lora_A.weight": (4, 70), f"{PREFIX}layers.7.q.lora_B.weight": (48, 4)},
        r"layers\.7\.q\.lora_A\.weight changes layers\.7\.q, but .*base has no tensor layers\.7\.q\.weight",
    ),
    "too wide": ({A: (4, 71), B: (48, 4)}, r"lora_A.weight and .*lora_B.weight have shapes \(4, 71\) and \(48, 4\)"),
    "too high": ({A: (4, 70), B: (47, 4)}, r"do not fit layers\.0\.q\.weight of .*base with \(48, 70\)"),
    "ranks that differ": ({A: (4, 70), B: (48, 5)}, "do not fit"),
    "rank of the configuration": ({A: (5, 70), B: (48, 5)}, r"adapter_config\.json says that the rank of .* is 4"),
    "a number": ({A: (), B: (48, 4)}, r"lora_A\.weight has shape \(\)"),
    "on a vector": (
        {f"{PREFIX}norm.lora_A.weight": (4, 48), f"{PREFIX}norm.lora_B.weight": (48, 4)},
        r"do not fit norm\.weight",
    ),
    "grouped convolution": (
        {f"{PREFIX}conv.lora_A.weight": (4, 10, 3, 3), f"{PREFIX}conv.lora_B.weight": (9, 2, 1, 1)}, "do not fit"
    ),
    "embedding as linear": (
        {f"{PREFIX}layers.0.q.lora_embedding_A": (4, 70), f"{PREFIX}layers.0.q.lora_embedding_B": (48, 4)},
        "do not fit",
    ),
    "dora": ({**PAIR, f"{PREFIX}layers.0.q.lora_magnitude_vector.weight": (48,)}, "magnitude_vector.* factor of DoRA"),
    "bias of a factor": ({**PAIR, f"{PREFIX}layers.0.q.lora_B.bias": (48,)}, r"lora_B\.bias is a factor of an unknown"),
    "twice": ({**PAIR, f"{PREFIX}layers.0.q.lora_A.default.weight": (4, 70)}, "are the same factor"),
    "two kinds": (
        {**PAIR, f"{PREFIX}layers.0.q.lora_embedding_A": (4, 48), f"{PREFIX}layers.0.q.lora_embedding_B": (70, 4)},
        "other factors of its module",
    ),
    "unknown tensor": ({**PAIR, "ia3_l": (3,)}, "ia3_l was trained, but .*base has no tensor ia3_l"),
    "a head that the base lacks": (
        {**PAIR, f"{PREFIX}score.weight": (2, 48)}, r"score\.weight was trained, but .* has no tensor score\.weight"
    ),
    "a head of another shape": ({**PAIR, f"{PREFIX}head.weight": (8, 48)}, r"head\.weight has shape \(8, 48\), but"),
    "a whole tensor twice": (
        {f"{PREFIX}head.base_layer.weight": (7, 48), f"{PREFIX}head.weight": (7, 48)}, "are the same tensor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(tmp_path, base, case):
    shapes, words = TENSORS[case]
    write_files(tmp_path / "lora", {name: zeros(*shape) for name, shape in shapes.items()}, {"r": 4})
    message = refusal(base, tmp_path / "lora")
    assert re.search(words, message), message
    assert str(tmp_path / "lora") in message


def test_a_configuration_of_any_size_is_not_read(tmp_path, base):
    write_adapter(tmp_path / "lora")
    with (tmp_path / "lora" / "adapter_config.json").open("a") as file:
        file.write(" " * (1 << 22))
    assert "bytes, but a configuration at most" in refusal(base, tmp_path / "lora")


CONFIGS = {
    "ia3": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "none": ({"peft_type": None}, "peft_type is None"),
    "loha": ({"peft_type": "LOHA"}, "only LORA"),
    "dora": ({"use_dora": True}, "DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias: True"),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["experts.up"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "alora": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    "of the future": ({"use_magic": {"x": 1}}, "use_magic"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "rank": ({"r": 0}, "r is 0"),
    "rank as text": ({"r": "4"}, "r is '4'"),
    "rank of a pattern": ({"rank_pattern": {"q": 1.5}}, r"rank_pattern\['q'\] is 1.5"),
    "alpha": ({"lora_alpha": "6"}, "lora_alpha is '6'"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "large alpha": ({"lora_alpha": 10**400}, "lora_alpha"),
    "pattern": ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\('"),
    "repeated group": (
        {"rank_pattern": {"(a+)+b": 1}},
        r"rank_pattern has '\(a\+\)\+b', which repeats a group and may take for ever",
    ),
    "counted group": ({"rank_pattern": {"(a|a){40}b": 1}}, "which repeats a group and may take for ever"),
    "repeated group in a group": ({"alpha_pattern": {"((?:a|a)*)b": 1}}, "which repeats a group and may take for ever"),
    "looking ahead": ({"rank_pattern": {"(?=(a))b": 1}}, r"has '\(\?=', which is not understood"),
    "flags": ({"rank_pattern": {"(?x:(a|a) *b)": 1}}, "which is not understood"),
    "flags for all": ({"rank_pattern": {"(?i)q": 1}}, "rank_pattern has"),
    "a large count": ({"rank_pattern": {"a{99999999999999999999}": 1}}, "which is no regular expression"),
    "many alternatives": (
        {"alpha_pattern": {"(.|.)" * 25 + "!": 1}},
        r"the pattern '.*take very long to compare with embed\.",
    ),
    "many repetitions": (
        {"alpha_pattern": {".*" * 9 + "!": 1}},
        r"the pattern '.*take very long to compare with embed\.",
    ),
    "many that may be there": ({"rank_pattern": {".?" * 25 + "!": 1}}, r"the pattern '.*take very long"),
    "patterns": ({"rank_pattern": [1]}, "rank_pattern is"),
    "flag": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(tmp_path, base, case):
    config, words = CONFIGS[case]
    write_adapter(tmp_path / "lora", **config)
    message = refusal(base, tmp_path / "lora")
    assert re.search(words, message), message
    assert "adapter_config.json" in message


@pytest.mark.parametrize("text", ["", "[]", "{", "nonsense", "\xff"])
def test_no_configuration_at_all(tmp_path, base, text):
    write_adapter(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "is no JSON object" in refusal(base, tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").unlink()
    assert "has no adapter_config.json, so it is no adapter" in refusal(base, tmp_path / "lora")


def test_two_checkpoints_are_no_base_and_adapter(base):
    assert "without a plus" in refusal(base, base)


def test_files_that_are_missing(tmp_path, base):
    assert f"{tmp_path}/lora: no such file or folder" in refusal(base, f"{tmp_path}/lora")
    write_adapter(tmp_path / "lora")
    assert f"{tmp_path}/none: no such file or folder" in refusal(f"{tmp_path}/none", tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    assert "no .safetensors file" in refusal(base, tmp_path / "lora")
    for odd in (f"{base}+", f"{base}++{base}", f"+{base}"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            open_checkpoints([odd])


def test_the_file_of_an_adapter_may_be_named(tmp_path, base):
    write_adapter(tmp_path / "lora")
    (checkpoint,) = open_checkpoints([f"{base}+{tmp_path}/lora/adapter_model.safetensors"])
    assert checkpoint.table.dtype(0).name == "F32"


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3"])
def test_a_quantised_base(tmp_path, dtype):
    write_checkpoint(tmp_path / "base", {"w.weight": zeros(8, 8, dtype=dtype)})
    write_files(tmp_path / "lora", {"w.lora_A.weight": zeros(2, 8), "w.lora_B.weight": zeros(8, 2)}, {"r": 2})
    assert f"w.weight is {dtype} in {tmp_path}/base" in refusal(tmp_path / "base", tmp_path / "lora")


def test_a_base_of_packed_weights(tmp_path):
    write_checkpoint(tmp_path / "base", {"w.qweight": zeros(8, 8, dtype="I32")})
    write_files(tmp_path / "lora", {"w.lora_A.weight": zeros(2, 8), "w.lora_B.weight": zeros(8, 2)}, {"r": 2})
    assert "holds w quantised" in refusal(tmp_path / "base", tmp_path / "lora")


def test_factors_of_bytes(tmp_path, base):
    write_files(tmp_path / "lora", {A: zeros(4, 70, dtype="I8"), B: zeros(48, 4)}, {"r": 4})
    assert "lora_A.weight is I8" in refusal(base, tmp_path / "lora")


def test_a_rank_above_all_bounds(tmp_path):
    write_checkpoint(tmp_path / "base", {"w.weight": zeros(2, 2)})
    write_files(tmp_path / "lora", {"w.lora_A.weight": zeros(2000, 2), "w.lora_B.weight": zeros(2, 2000)}, {"r": 2000})
    assert "rank 2,000 is above 1,024" in refusal(tmp_path / "base", tmp_path / "lora")


def test_square_weights_that_may_be_meant_either_way(tmp_path):
    """PEFT knows the classes of modules, and corrects what its configuration says."""
    write_checkpoint(tmp_path / "base", {"square.weight": zeros(8, 8), "wide.weight": zeros(8, 12)})
    tensors = {
        "square.lora_A.weight": zeros(2, 8),
        "square.lora_B.weight": zeros(8, 2),
        "wide.lora_A.weight": zeros(2, 8),
        "wide.lora_B.weight": zeros(12, 2),
    }
    write_files(tmp_path / "lora", tensors, {"r": 2, "fan_in_fan_out": False})
    assert "how those of the square square are meant" in refusal(tmp_path / "base", tmp_path / "lora")
    write_files(tmp_path / "right", tensors, {"r": 2, "fan_in_fan_out": True})
    open_checkpoints([f"{tmp_path}/base+{tmp_path}/right"])
    del tensors["square.lora_A.weight"], tensors["square.lora_B.weight"]
    write_files(tmp_path / "clear", tensors, {"r": 2, "fan_in_fan_out": False})
    open_checkpoints([f"{tmp_path}/base+{tmp_path}/clear"])


def test_not_a_number_is_found(tmp_path, base):
    adapter = write_adapter(tmp_path / "lora")
    adapter[A][0, 0] = np.nan
    write_files(tmp_path / "lora", adapter, {"r": 4})
    with pytest.raises(StreamsoupError, match=r"layers\.0\.q\.weight: .* NaN or infinite .*\+"):
        streamsoup.soup([f"{base}+{tmp_path}/lora"] * 2, tmp_path / "soup")


# -- soups of adapters alone -------------------------------------------------------------------------------------


def adapters(tmp_path, **second):
    paths = []
    for i, config in enumerate([{"target_modules": ["q", "k"]}, {"target_modules": ["k", "q"], **second}]):
        write_adapter(tmp_path / f"lora{i}", seed=i, **config)
        paths.append(str(tmp_path / f"lora{i}"))
    return paths


def test_adapters_are_averaged_with_a_note(tmp_path):
    result = streamsoup.soup(adapters(tmp_path), tmp_path / "soup")
    (note,) = result.notes
    assert "not the average of their products" in note
    assert "give base+adapter for each" in note
    assert json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["notes"] == [note]
    assert (tmp_path / "soup" / "adapter_config.json").exists()
    assert f"- {note}" in (tmp_path / "soup" / "README.md").read_text()


def test_a_soup_of_adapters_is_one(tmp_path, base):
    streamsoup.soup(adapters(tmp_path), tmp_path / "soup")
    open_checkpoints([f"{base}+{tmp_path}/soup"])


DIFFERENT = {
    "lora_alpha": 12,
    "use_rslora": True,
    "alpha_pattern": {"q": 2},
    "rank_pattern": {"x": 2},
    "fan_in_fan_out": True,
    "target_modules": ["q"],
    "peft_type": "ADALORA",
    "r": 9,
}


@pytest.mark.parametrize("key", DIFFERENT)
def test_configurations_that_disagree(tmp_path, key):
    paths = adapters(tmp_path, **{key: DIFFERENT[key]})
    with pytest.raises(MismatchError) as caught:
        streamsoup.soup(paths, tmp_path / "soup")
    message = str(caught.value)
    for word in (f"{paths[0]}/adapter_config.json", f"{paths[1]}/adapter_config.json", key, repr(DIFFERENT[key])):
        assert word in message, message
    with pytest.raises(MismatchError):
        streamsoup.greedy(paths, score=lambda candidate: 1.0, out=tmp_path / "greedy")


def test_a_configuration_that_is_missing(tmp_path):
    paths = adapters(tmp_path)
    (tmp_path / "lora1" / "adapter_config.json").unlink()
    with pytest.raises(MismatchError, match=r"lora1: has no adapter_config\.json"):
        streamsoup.soup(paths, tmp_path / "soup")


def test_a_greedy_soup_of_adapters_has_the_note(tmp_path):
    streamsoup.greedy(adapters(tmp_path), score=lambda candidate: 1.0, out=tmp_path / "soup")
    assert "products" in json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["notes"][0]


def test_what_lies_in_the_working_folder_is_nothing_to_live_adapters(tmp_path, monkeypatch):
    tensors = write_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert adapter_notes([open_live(tensors, "live:0"), open_live(tensors, "live:1")]) == ()
