"""Checkpoints of 8-bit floats with scales: the bits of the files that would hold the numbers, and what is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from factory import DTYPES, any_bits, read_checkpoint, same_bits, write_checkpoint

import streamsoup
from streamsoup.checkpoints import identify, open_checkpoints
from streamsoup.checkpoints.grids import Grid, grid_of
from streamsoup.checkpoints.scaled import ScaledCheckpoint
from streamsoup.errors import (
    ChangedIngredientError,
    CheckpointError,
    MismatchError,
    NonFiniteError,
    UnsupportedDTypeError,
)
from streamsoup.read import open_sources
from streamsoup.source import STRIP_BYTES

BF16 = DTYPES["BF16"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
# Name, dtype, shape, scale's suffix, dtype and shape, and how often it is repeated along rows and columns.
WEIGHTS = (
    ("layers.0.q.weight", "F8_E4M3", (300, 259), "_scale_inv", "F32", (3, 3), (128, 128)),
    ("layers.0.k.weight", "F8_E4M3", (128, 128), "_scale_inv", "BF16", (1, 1), (128, 128)),
    ("layers.0.v.weight", "F8_E5M2", (3, 129), "_scale_inv", "F32", (1, 2), (128, 128)),
    ("layers.0.experts", "F8_E4M3", (3, 130, 140), "_scale_inv", "F32", (3, 2, 2), (128, 128)),
    ("layers.1.q.weight", "F8_E4M3", (70, 300), "_scale", "F32", (), (70, 300)),
    ("layers.1.k.weight", "F8_E4M3", (70, 300), "_scale", "BF16", (1,), (70, 300)),
    ("layers.1.v.weight", "F8_E4M3", (70, 300), "_scale", "F16", (70, 1), (1, 300)),
    ("layers.1.o.weight", "F8_E4M3", (70, 300), "_scale", "F32", (70,), (1, 300)),
    ("layers.1.up", "F8_E4M3", (2, 60, 90), "_scale", "F32", (2, 1, 90), (60, 1)),
    ("layers.1.gate.weight", "F8_E4M3", (200, 300), "_scale", "F32", (2, 3), (128, 128)),
    ("layers.2.tall.weight", "F8_E4M3", (70_000, 2), "_scale", "F32", (70_000, 1), (1, 2)),
    ("layers.2.wide.weight", "F8_E4M3", (3, 70_000), "_scale", "F32", (1, 70_000), (3, 1)),
)


def run_of(seed, dtype="F32"):
    """Tensors as they are stored, and as they are meant, the scaled ones in a dtype."""
    rng = np.random.default_rng(seed)
    stored = {"embed.weight": rng.standard_normal((50, 20)).astype(BF16), "steps": np.arange(3)}
    meant = dict(stored)
    for name, kind, shape, suffix, scale_kind, scale_shape, repeats in WEIGHTS:
        weight = any_bits(rng, kind, shape)
        scale = np.asarray(rng.uniform(1e-3, 2e-3, scale_shape)).astype(DTYPES[scale_kind])
        wide = np.asarray(scale, np.float32)
        wide = wide.reshape((*shape[:-2], *(-(-n // r) for n, r in zip(shape[-2:], repeats, strict=True))))
        wide = np.repeat(np.repeat(wide, repeats[0], -2), repeats[1], -1)[..., : shape[-2], : shape[-1]]
        stored[name], stored[name + suffix] = weight, scale
        meant[name] = (weight.astype(np.float32) * wide).astype(DTYPES[dtype])
    stored["layers.1.q.input_scale"] = stored["layers.1.k.k_scale"] = np.ones((), np.float32)
    return stored, meant


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaled")
    for seed in range(3):
        stored, meant = run_of(seed)
        companions = {"config.json": json.dumps(CONFIG), "hf_quant_config.json": "{}"}
        write_checkpoint(folder / f"scaled-{seed}", stored, shards=3, pad=1 + seed, companions=companions)
        write_checkpoint(folder / f"plain-{seed}", meant, shards=2)
    return folder


def mixed(runs, kind):
    return [str(runs / f"{kind}-0"), str(runs / "plain-1"), str(runs / f"{kind}-2")]


def soup_of(tmp_path, paths, name, **options):
    streamsoup.soup(paths, tmp_path / name, **options)
    return read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("read_mode", "workers", "device"), list(itertools.product(["map", "ahead", "plain"], [1, 3], ["cpu", "torch:cpu"]))
)
def test_a_soup_has_the_bits_of_that_of_the_products(tmp_path, runs, read_mode, workers, device, monkeypatch):
    expected = soup_of(tmp_path, mixed(runs, "plain"), "expected")
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    options = {"read_mode": read_mode, "workers": workers, "device": device, "dtype": "float32"}
    found = soup_of(tmp_path, mixed(runs, "scaled"), "found", **options)
    expected["embed.weight"] = found["embed.weight"]  # float32 was asked for
    assert same_bits(found, expected)


@pytest.mark.parametrize("read_mode", ["map", "plain"])
def test_a_soup_of_one_holds_the_products(tmp_path, runs, read_mode):
    meant = run_of(0)[1]
    found = soup_of(tmp_path, [str(runs / "scaled-0")], "found", dtype="float32", read_mode=read_mode)
    assert found.keys() == meant.keys()
    for name, _, *_ in WEIGHTS:
        assert same_bits({name: found[name]}, {name: meant[name]}), name


def test_strips_are_bounded_where_files_are_read_into_buffers(runs):
    """The reader of parts refuses larger ones; whole tensors at once, from any element on."""
    (checkpoint,) = open_checkpoints([str(runs / "scaled-0")])
    positions, meant = checkpoint.table.positions(), run_of(0)[1]
    room = np.empty(4 * 210_000, np.uint8)
    with open_sources([checkpoint], "plain") as (source,):
        for name, *_ in WEIGHTS:
            flat = meant[name].reshape(-1)
            for first in (0, 1, flat.size // 2 + 1, flat.size - 1):
                wanted = flat[first:].tobytes()
                source.fetch(positions[name], 4 * first, len(wanted), memoryview(room)[: len(wanted)])
                assert room[: len(wanted)].tobytes() == wanted, (name, first)


def test_out_dtypes_names_and_companions(tmp_path, runs):
    result = streamsoup.soup(mixed(runs, "scaled"), tmp_path / "soup")
    found = read_checkpoint(tmp_path / "soup")
    assert all(found[name].dtype == BF16 for name, *_ in WEIGHTS)
    assert found["steps"].dtype == np.int64
    assert not [name for name in found if "scale" in name]
    config = json.loads((tmp_path / "soup" / "config.json").read_text())
    assert config == {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    assert not (tmp_path / "soup" / "hf_quant_config.json").exists()
    assert [note.split(" (")[0] for note in result.notes] == [
        "8-bit floats were multiplied by their scales.",
        "Scales of activations, keys and values",
        "hf_quant_config.json was left out.",
        "quantization_config of config.json was left out.",
    ]
    assert list(result.notes) == json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["notes"]


def test_nested_configurations_are_corrected_too(tmp_path):
    config = {"text_config": {"hidden_size": 4, "quantization_config": {"weight_block_size": [2, 2]}}, "x": 1}
    tensors = {"a.weight": np.ones((3, 4), DTYPES["F8_E4M3"]), "a.weight_scale_inv": np.ones((2, 2), np.float32)}
    run = write_checkpoint(tmp_path / "run", tensors, companions={"config.json": json.dumps(config)})
    streamsoup.soup([str(run)], tmp_path / "soup")
    found = json.loads((tmp_path / "soup" / "config.json").read_text())
    assert found == {"text_config": {"hidden_size": 4}, "x": 1}


def test_settings_are_only_said_to_be_left_out_where_they_are(tmp_path):
    """Not of a checkpoint that has none, or lends the soup no files: one behind the first, or a file alone."""
    (file,) = write_checkpoint(tmp_path / "file", SCALED, companions={"config.json": json.dumps(CONFIG)}).glob(
        "*.safet*"
    )
    bare = write_checkpoint(tmp_path / "bare", SCALED)
    silent = write_checkpoint(tmp_path / "silent", SCALED, companions={"config.json": '{"hidden_size": 300}'})
    plain = write_checkpoint(tmp_path / "plain", {"a.weight": f32(4, 300)})
    for number, paths in enumerate([[file], [bare], [silent], [plain, tmp_path / "file"]]):
        notes = streamsoup.soup(list(map(str, paths)), tmp_path / f"soup{number}").notes
        assert list(notes) == ["8-bit floats were multiplied by their scales."], paths


def test_the_scale_of_a_weight_may_have_the_name_of_one_of_activations(tmp_path):
    tensors = {"attn.q": fp8(4, 4), "attn.q_scale": f32(1), "attn.k": np.ones((4, 4), BF16)}
    result = streamsoup.soup([str(write_checkpoint(tmp_path / "run", tensors))], tmp_path / "soup")
    assert list(result.notes) == ["8-bit floats were multiplied by their scales."]


@pytest.mark.parametrize(
    "quantisation",
    [
        {"weight_block_size": [2, 3]},
        {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [2, 3]}}}},
    ],
)
def test_the_size_of_blocks_is_that_of_the_configuration(tmp_path, quantisation):
    weight, scale = any_bits(np.random.default_rng(0), "F8_E4M3", (5, 7)), np.arange(1, 10, dtype=np.float32)
    tensors = {"a.weight": weight, "a.weight_scale": scale.reshape(3, 3)}
    companions = {"config.json": json.dumps({"quantization_config": quantisation})}
    run = write_checkpoint(tmp_path / "run", tensors, companions=companions)
    wide = np.repeat(np.repeat(scale.reshape(3, 3), 2, 0), 3, 1)[:5, :7]
    found = soup_of(tmp_path, [str(run)], "soup", dtype="float32")
    assert same_bits(found, {"a.weight": weight.astype(np.float32) * wide})


@pytest.mark.parametrize("size", [[128], [0, 128], "128", [True, 128], [128.0, 128]])
def test_a_size_of_blocks_that_is_none_is_refused(tmp_path, size):
    tensors = {"a.weight": np.ones((3, 4), DTYPES["F8_E4M3"]), "a.weight_scale_inv": np.ones((1, 1), np.float32)}
    companions = {"config.json": json.dumps({"quantization_config": {"weight_block_size": size}})}
    run = write_checkpoint(tmp_path / "run", tensors, companions=companions)
    with pytest.raises(CheckpointError, match="two whole numbers"):
        open_checkpoints([str(run)])


@pytest.mark.parametrize("config", ["[]", "{}", '{"quantization_config": 3}', '{"quantization_config": null}'])
def test_a_configuration_that_says_nothing_leaves_blocks_of_128(tmp_path, config):
    tensors = {"a.weight": np.ones((3, 300), DTYPES["F8_E4M3"]), "a.weight_scale_inv": np.ones((1, 3), np.float32)}
    run = write_checkpoint(tmp_path / "run", tensors, companions={"config.json": config})
    (found,) = open_checkpoints([str(run)])
    assert isinstance(found, ScaledCheckpoint)
    assert found.block == (128, 128)


def test_a_broken_configuration_is_no_matter_where_no_scale_depends_on_it(tmp_path):
    tensors = {"a.weight": fp8(3, 4), "ids": np.ones(3, np.uint8)}
    open_checkpoints([str(write_checkpoint(tmp_path / "run", tensors, companions={"config.json": "{"}))])


def test_greedy_finds_the_same(tmp_path, runs):
    results = []
    for kind in ("scaled", "plain"):
        options = {"dtype": "bfloat16", "out": tmp_path / kind, "workdir": tmp_path / f"work-{kind}"}
        result = streamsoup.greedy(mixed(runs, kind), score=lambda candidate: 1.0, **options)
        results.append([(trial.accepted, trial.score) for trial in result.trials])
    assert results[0] == results[1]
    assert same_bits(read_checkpoint(tmp_path / "scaled"), read_checkpoint(tmp_path / "plain"))
    assert "quantization_config" not in json.loads((tmp_path / "scaled" / "config.json").read_text())


def test_layers_can_be_picked(tmp_path):
    rng = np.random.default_rng(0)
    stored, meant = {}, {}
    for layer in range(3):
        weight, scale = any_bits(rng, "F8_E4M3", (5, 6)), np.array([[layer + 1.5]], np.float32)
        stored |= {f"layers.{layer}.a.weight": weight, f"layers.{layer}.a.weight_scale_inv": scale}
        meant[f"layers.{layer}.a.weight"] = weight.astype(np.float32) * scale
    config = {"num_hidden_layers": 3, "quantization_config": {}}
    run = write_checkpoint(tmp_path / "run", stored, companions={"config.json": json.dumps(config)})
    found = soup_of(tmp_path, [f"{run}[0:1]+{run}[2:3]"], "soup", dtype="float32")
    assert same_bits(found, {f"layers.{i}.a.weight": meant[f"layers.{2 * i}.a.weight"] for i in range(2)})
    assert json.loads((tmp_path / "soup" / "config.json").read_text()) == {"num_hidden_layers": 2}


def test_adapters_go_on_what_the_numbers_stand_for(tmp_path):
    weight, rng = any_bits(np.random.default_rng(0), "F8_E4M3", (300, 140)), np.random.default_rng(1)
    scale = rng.uniform(1e-3, 2e-3, (3, 2)).astype(np.float32)
    wide = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:300, :140]
    name = "layers.0.q_proj.weight"
    scaled = write_checkpoint(tmp_path / "scaled", {name: weight, f"{name}_scale_inv": scale})
    plain = write_checkpoint(tmp_path / "plain", {name: weight.astype(np.float32) * wide})
    factors = {"lora_A": (4, 140), "lora_B": (300, 4)}
    prefix = "base_model.model.layers.0.q_proj"
    tensors = {f"{prefix}.{f}.weight": rng.standard_normal(s).astype(np.float32) for f, s in factors.items()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    adapter = tmp_path / "adapter"
    write_checkpoint(adapter / "adapter_model.safetensors", tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    paths = [f"{base}+{adapter}" for base in (scaled, plain)]
    found, expected = (soup_of(tmp_path, [path], str(i), dtype="float32") for i, path in enumerate(paths))
    assert same_bits(found, expected)
    assert soup_of(tmp_path, [f"{scaled}+{adapter}"], "own")[name].dtype == BF16


def test_equal_headers_share_what_was_found(runs, tmp_path):
    for seed in range(2):
        write_checkpoint(tmp_path / f"{seed}", run_of(seed)[0], companions={"config.json": json.dumps(CONFIG)})
    one, other = open_checkpoints([str(tmp_path / "0"), str(tmp_path / "1")])
    assert one.table is other.table
    assert one.scaling is other.scaling
    assert identify(one) != identify(other)


def test_a_scale_that_is_not_finite_is_reported_by_name(tmp_path):
    scale = np.ones((1, 3), np.float32)
    scale[0, 1] = np.nan
    tensors = {"a.weight": np.ones((3, 300), DTYPES["F8_E4M3"]), "a.weight_scale_inv": scale}
    run = write_checkpoint(tmp_path / "run", tensors)
    with pytest.raises(NonFiniteError, match=r"a\.weight: 384 NaN.*run"):
        streamsoup.soup([str(run)], tmp_path / "soup")


def test_a_truncated_scale_and_other_names_are_told_of(tmp_path, runs):
    stored = dict(run_of(0)[0])
    del stored["layers.0.q.weight"], stored["layers.0.q.weight_scale_inv"]
    run = write_checkpoint(tmp_path / "run", stored)
    with pytest.raises(MismatchError, match=r"layers\.0\.q\.weight: in .*plain-0, but missing from"):
        streamsoup.soup([str(runs / "plain-0"), str(run)], tmp_path / "soup")


# -- what is refused ---------------------------------------------------------------------------------------------


def fp8(*shape):
    return np.ones(shape, DTYPES["F8_E4M3"])


def f32(*shape):
    return np.ones(shape, np.float32)


SCALED = {"a.weight": fp8(4, 300), "a.weight_scale_inv": f32(1, 3)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({**SCALED, "b.weight_scale_inv": f32(1, 1)}, r"b\.weight_scale_inv: .*not there"),
        ({**SCALED, "b.weight": fp8(4, 4)}, r"b\.weight: .*without a scale, but other weights have scales"),
        ({"a.weight": fp8(4, 300), "a.weight_scale_inv": f32(1, 2)}, r"scale_inv: .*\(1, 2\).*\(1, 3\).*128x128"),
        ({"a.weight": fp8(4, 300), "a.weight_scale_inv": f32(3, 1)}, r"scale_inv: .*\(3, 1\).*\(1, 3\)"),
        ({"a.weight": fp8(4, 300), "a.weight_scale_inv": f32(4, 1)}, r"scale_inv: .*\(4, 1\).*\(1, 3\)"),
        ({"a.weight": fp8(4, 300), "a.weight_scale_inv": f32(1, 1)}, r"scale_inv: .*\(1, 1\).*\(1, 3\)"),
        ({"a.weight": fp8(4, 300), "a.weight_scale": f32(300, 1)}, r"weight_scale: .*\(300, 1\)"),
        ({"a.weight": fp8(300), "a.weight_scale": f32(3)}, r"weight_scale: .*\(3,\)"),
        ({"a.weight": fp8(2, 2, 4, 4), "a.weight_scale": f32(2, 2, 1, 1)}, r"weight_scale: .*\(2, 2, 1, 1\)"),
        ({"a.weight": fp8(2, 4, 4), "a.weight_scale": f32(3, 1, 1)}, r"weight_scale: .*\(3, 1, 1\)"),
        ({"a.weight": fp8(4, 300), "a.weight_scale_inv": f32(1, 0)}, r"scale_inv: .*\(1, 0\)"),
        ({**SCALED, "a.weight_scale": f32(1)}, r"a\.weight: .*two scales"),
        ({**SCALED, "a.weight_zero_point": f32(1)}, r"zero_point: .*more than scales"),
        ({**SCALED, "a.input_scale": f32(4)}, r"input_scale: .*\(4,\).*single"),
        ({"a.weight": fp8(4, 4), "a.weight_scale": np.ones(1)}, r"weight_scale: .*F64"),
        ({"a.weight": fp8(4, 4), "a.weight_scale": np.ones((4, 1), np.uint8)}, r"weight_scale: .*U8"),
        ({"a.weight": fp8(4, 64), "a.weight_scale": np.ones((4, 2), DTYPES["F8_E8M0"])}, r"weight_scale: .*MX"),
        (
            {"a.weight": np.ones((4, 32), np.uint8), "a.weight_scale": fp8(4, 4), "a.weight_scale_2": f32()},
            r"a\.weight: .*U8 with scales",
        ),
        (
            {"a.weight_packed": np.ones((4, 32), np.uint8), "a.weight_scale": fp8(4, 4)},
            r"a\.weight_packed: .*U8 with scales",
        ),
        ({"a.weight": np.ones((4, 4), np.int8), "a.weight_scale": f32(4, 1)}, r"a\.weight: .*I8 with scales"),
        ({"a.weight": np.ones((4, 4), np.int8), "a.SCB": f32(4)}, r"a\.weight: .*I8 with scales in a\.SCB"),
        ({"a.qweight": np.ones((4, 4), np.int32), "a.scales": f32(4)}, r"a\.qweight: .*I32 with scales"),
        ({"a.weight": f32(4, 4), "a.weight_scale": f32(1), "b": fp8(4)}, r"a\.weight_scale: .*F32"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_sentence(tmp_path, tensors, said):
    run = write_checkpoint(tmp_path / "run", tensors)
    with pytest.raises(UnsupportedDTypeError, match=said) as caught:
        open_checkpoints([str(run)])
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_has_a_scale_by_name_alone_is_averaged_as_ever(tmp_path):
    tensors = {**SCALED, "logit_scale": f32(), "norm.scale": f32(5), "layer_scale": f32(4), "ids": np.ones(3, np.int8)}
    (found,) = open_checkpoints([str(write_checkpoint(tmp_path / "run", tensors))])
    assert found.table.names == ("a.weight", "logit_scale", "norm.scale", "layer_scale", "ids")
    plain = {"a.weight": fp8(4), "norm.scale": f32(5), "logit_scale": f32()}
    (found,) = open_checkpoints([str(write_checkpoint(tmp_path / "plain", plain))])
    assert not isinstance(found, ScaledCheckpoint)


# -- command line ------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, runs, cli):
    paths = mixed(runs, "scaled")
    assert "fit together" in cli("inspect", *paths).stdout
    for options in (["--dry-run"], []):
        done = cli("soup", *paths, "-o", "soup", *options)
        assert done.returncode == 0, done.stderr
        assert "multiplied by their scales" in done.stdout
    expected = soup_of(tmp_path, mixed(runs, "plain"), "expected", dtype="bfloat16")
    assert same_bits(read_checkpoint(tmp_path / "soup"), expected)
    broken = write_checkpoint(tmp_path / "broken", {**SCALED, "b.weight": fp8(4, 4)})
    done = cli("soup", *paths, broken, "-o", "other")
    assert done.returncode == 1
    assert done.stderr.startswith("streamsoup: b.weight: in ")
    assert len(done.stderr.splitlines()) == 1


def test_an_interrupted_soup_goes_on(tmp_path, runs, monkeypatch):
    def stop(progress):
        if progress.done_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    with pytest.raises(KeyboardInterrupt):
        streamsoup.soup(mixed(runs, "scaled"), tmp_path / "soup", workers=1, progress=stop)
    streamsoup.resume(tmp_path / "soup")
    expected = soup_of(tmp_path, mixed(runs, "plain"), "expected", dtype="bfloat16")
    assert same_bits(read_checkpoint(tmp_path / "soup"), expected)


@pytest.mark.parametrize("again", [{}, {"weight_block_size": [127, 127]}])
def test_a_soup_goes_on_only_with_the_same_blocks(tmp_path, monkeypatch, again):
    """The size is that of config.json, which is no file of weights."""
    tensors = {}
    for i in range(6):
        tensors[f"w{i}.weight"] = any_bits(np.random.default_rng(i), "F8_E4M3", (500, 500))
        tensors[f"w{i}.weight_scale_inv"] = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    block = {"quantization_config": {"weight_block_size": [128, 128]}}
    run = write_checkpoint(tmp_path / "run", tensors, companions={"config.json": json.dumps(block)})
    expected = soup_of(tmp_path, [str(run)] * 2, "expected", nonfinite="allow")

    def stop(progress):
        if progress.done_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    with pytest.raises(KeyboardInterrupt):
        streamsoup.soup([str(run)] * 2, tmp_path / "soup", workers=1, progress=stop, nonfinite="allow")
    block["quantization_config"] |= again
    (run / "config.json").write_text(json.dumps({**block, "dtype": "bfloat16"}))  # what decides nothing may change
    if again:
        with pytest.raises(ChangedIngredientError, match="configured"):
            streamsoup.resume(tmp_path / "soup")
    else:
        streamsoup.resume(tmp_path / "soup")
        assert same_bits(read_checkpoint(tmp_path / "soup"), expected)


def test_a_configuration_of_any_size_is_not_read(tmp_path):
    tensors = {"a.weight": np.ones((5, 7), DTYPES["F8_E4M3"]), "a.weight_scale": np.ones((3, 3), np.float32)}
    companions = {"config.json": json.dumps({"quantization_config": {"weight_block_size": [2, 3]}})}
    run = write_checkpoint(tmp_path / "run", tensors, companions=companions)
    with (run / "config.json").open("a") as file:
        file.write(" " * (1 << 22))
    with pytest.raises(CheckpointError, match=r"config\.json: has 4,194,\d+ bytes, but a configuration at most"):
        open_checkpoints([str(run)])


def test_a_file_is_read_by_the_configuration_beside_it(tmp_path):
    tensors = {"a.weight": np.ones((5, 7), DTYPES["F8_E4M3"]), "a.weight_scale": np.ones((3, 3), np.float32)}
    companions = {"config.json": json.dumps({"quantization_config": {"weight_block_size": [2, 3]}})}
    run = write_checkpoint(tmp_path / "run", tensors, companions=companions)
    (file,) = run.glob("*.safetensors")
    whole, alone = open_checkpoints([str(run), str(file)])
    assert whole.block == alone.block == (2, 3)
    (run / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        open_checkpoints([str(file)])


@pytest.mark.parametrize("scales", [(0, 2), (1, 2)])
def test_a_weight_without_rows_may_have_no_scales(tmp_path, scales):
    tensors = {
        "a.weight": np.ones((0, 130), DTYPES["F8_E4M3"]),
        "a.weight_scale_inv": np.ones(scales, np.float32),
        "b.weight": np.ones((4, 4), DTYPES["F8_E4M3"]),
        "b.weight_scale_inv": np.full((1, 1), 3, np.float32),
    }
    found = soup_of(tmp_path, [str(write_checkpoint(tmp_path / "run", tensors))], "soup", dtype="float32")
    assert found["a.weight"].shape == (0, 130)
    assert (found["b.weight"] == 3).all()


# -- grids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid(5, 7, 2, 3), Grid(1, 35, 1, 35), Grid(5, 7, 1, 7), Grid(5, 7, 5, 1)])
@pytest.mark.parametrize(("most", "most_scales"), [(1, 1), (4, 2), (1000, 1), (1000, 4), (9, 1000)])
def test_pieces_cover_all_elements_with_their_scales(grid, most, most_scales):
    matrices, size = 3, grid.rows * grid.columns
    first, elements = 0, matrices * size
    while first < elements:
        count, at, scales = grid.piece(first, min(most, elements - first), most_scales)
        assert 0 < count <= most
        assert scales <= most_scales
        for element in range(first, first + count):
            column = element % grid.columns // grid.block_columns
            assert at <= grid.line_of(element) * grid.line + column < at + scales
        first += count
    assert first == elements


def test_one_scale_may_be_written_in_several_ways():
    for shape in ((), (1,)):
        assert grid_of((4, 5), shape, (128, 128), may_repeat=False) == Grid(1, 20, 1, 20)
    assert grid_of((400, 5), (1, 1), (128, 128), may_repeat=True) == Grid(400, 5, 400, 5)
    assert grid_of((400, 5), (1, 1), (128, 128), may_repeat=False) is None
    assert STRIP_BYTES // 4 < 70_000  # a row of scales is more than a strip in the tests above
