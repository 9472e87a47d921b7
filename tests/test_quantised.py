"""Checkpoints that are quantised as they are read: the bits of numpy's quantisation, and back."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from factory import DTYPES, any_bits, read_checkpoint, same_bits, write_checkpoint
from numpy.testing import assert_array_equal

import streamsoup
from streamsoup import checkpoints
from streamsoup.checkpoints import open_checkpoints, quantised, scaled_names
from streamsoup.errors import CheckpointError, NonFiniteError, RecipeError
from streamsoup.read import open_sources

BF16, E4M3 = DTYPES["BF16"], DTYPES["F8_E4M3"]
SHAPES = {
    "embed_tokens.weight": (300, 130),
    "layers.0.q_proj.weight": (300, 259),
    "layers.0.k_proj.weight": (128, 128),
    "layers.0.mlp.gate.weight": (130, 256),
    "layers.0.mlp.gate_proj.weight": (129, 1000),
    "layers.0.input_layernorm.weight": (259,),
    "layers.0.small.weight": (127, 400),
    "layers.0.q_proj.bias": (300,),
    "layers.1.embed_tokens.weight": (300, 130),
    "layers.1.shared_head.head.weight": (300, 130),
    "lm_head.weight": (300, 130),
}
LINEAR = ("layers.0.q_proj.weight", "layers.0.k_proj.weight", "layers.0.mlp.gate_proj.weight")


def weights(seed, dtype):
    rng = np.random.default_rng(seed)
    tensors = {name: (rng.standard_normal(shape) * 0.02).astype(dtype) for name, shape in SHAPES.items()}
    tensors["layers.0.q_proj.weight"][128:256, 128:256] = 0
    tensors["layers.0.q_proj.weight"][:, 256:] *= 2.0**-20
    return tensors


def blocks(array):
    """Cut the matrices of an array into blocks, with zeros where they end: shape (..., lines, 128, columns, 128)."""
    rows, columns = array.shape[-2:]
    pad = [(0, 0)] * (array.ndim - 2) + [(0, -rows % 128), (0, -columns % 128)]
    wide = np.pad(array.astype(np.float32), pad)
    return wide.reshape(*array.shape[:-2], wide.shape[-2] // 128, 128, wide.shape[-1] // 128, 128)


def widened(scales, shape):
    return np.repeat(np.repeat(scales, 128, -2), 128, -1)[..., : shape[-2], : shape[-1]]


def reference(array):
    """Quantise by the book."""
    largest = np.abs(blocks(array)).max((-3, -1))
    scales = np.maximum(largest / np.float32(448), np.float32(2.0**-126))
    scales[largest == 0] = 1
    with np.errstate(invalid="ignore"):
        divided = array.astype(np.float32) / widened(scales, array.shape)
    return np.clip(divided, -448, 448).astype(E4M3), scales


def expected_of(tensors, names):
    found = {}
    for name, array in tensors.items():
        found[name] = array
        if name in names:
            found[name], found[f"{name}_scale_inv"] = reference(array)
    return found


@pytest.fixture
def quantising(monkeypatch):
    """Have checkpoints quantised whose paths say so."""
    before = checkpoints.dequantised

    def dequantised(checkpoint, known):
        found = before(checkpoint, known)
        return quantised(found) if checkpoint.path.endswith("-q") else found

    monkeypatch.setattr(checkpoints, "dequantised", dequantised)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    config = {"architectures": ["X"], "torch_dtype": "bfloat16"}
    for dtype in ("F32", "BF16", "F16"):
        companions = {"config.json": json.dumps(config)}
        write_checkpoint(folder / f"{dtype}-q", weights(0, DTYPES[dtype]), shards=2, companions=companions)
    return folder


@pytest.mark.parametrize(
    ("read_mode", "workers", "device", "tile"),
    list(itertools.product(["map", "ahead", "plain"], [3], ["cpu", "torch:cpu"], [2048, 1 << 20])),
)
def test_the_bits_are_those_of_the_book(tmp_path, runs, quantising, read_mode, workers, device, tile, monkeypatch):
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(tile, workers)])
    options = {"read_mode": read_mode, "workers": workers, "device": device}
    streamsoup.soup([str(runs / "BF16-q")], tmp_path / "soup", **options)
    assert same_bits(read_checkpoint(tmp_path / "soup"), expected_of(weights(0, BF16), LINEAR))


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_other_dtypes(tmp_path, runs, quantising, dtype):
    streamsoup.soup([str(runs / f"{dtype}-q")], tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), expected_of(weights(0, DTYPES[dtype]), LINEAR))


def test_the_configuration_says_so(tmp_path, runs, quantising):
    result = streamsoup.soup([str(runs / "BF16-q")], tmp_path / "soup")
    config = json.loads((tmp_path / "soup" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "embed_tokens",
            "layers.0.mlp.gate",
            "layers.0.small",
            "layers.1.embed_tokens",
            "layers.1.shared_head.head",
            "lm_head",
        ],
    }
    assert config["torch_dtype"] == "bfloat16"
    assert result.notes[0].startswith("3 weight(s) were quantised to fp8")


def test_the_soup_of_what_was_quantised_is_near(tmp_path, runs, quantising):
    """Half of the last place of e4m3, which has three bits; below the least normal, half of the least subnormal."""
    streamsoup.soup([str(runs / "F32-q")], tmp_path / "quantised")
    streamsoup.soup([str(tmp_path / "quantised")], tmp_path / "soup", dtype="float32")
    found, before = read_checkpoint(tmp_path / "soup"), weights(0, np.float32)
    assert found.keys() == before.keys()
    for name, array in before.items():
        if name in LINEAR:
            scales = widened(reference(array)[1], array.shape)
            bound = np.maximum(np.abs(array) * 2.0**-4, scales * 2.0**-10) * (1 + 2.0**-20)
            assert (np.abs(found[name] - array) <= bound).all()
            assert (found[name] != array).any()
        else:
            assert_array_equal(found[name], array)


def scaled_run(path, scale_dtype, seed=0):
    """Weights with a code of 448 in every block, as those have that were quantised by their largest."""
    rng = np.random.default_rng(seed)
    weight = any_bits(rng, "F8_E4M3", (300, 259))
    weight[::64, ::64] = 448
    scale = rng.uniform(1e-4, 1e-2, (3, 3)).astype(scale_dtype)
    tensors = {"a.b.weight": weight, "a.b.weight_scale_inv": scale.astype(np.float32), "a.c.weight": weight[:2].copy()}
    tensors["a.c.weight"] = tensors["a.c.weight"].astype(BF16)
    return write_checkpoint(path, tensors), tensors


def test_what_was_scaled_is_quantised_back_to_the_same_bits(tmp_path, quantising):
    """With scales of few bits, whose multiples are exact; and the name of the weight is in no layer."""
    run, tensors = scaled_run(tmp_path / "run-q", BF16)
    assert scaled_names(open_checkpoints([str(run)])[0]) == {"a.b.weight"}
    streamsoup.soup([str(run)], tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), tensors)


def test_scales_of_all_bits_come_back_to_the_last_place_and_codes_exactly(tmp_path, quantising):
    run, tensors = scaled_run(tmp_path / "run-q", np.float32)
    streamsoup.soup([str(run)], tmp_path / "soup")
    found = read_checkpoint(tmp_path / "soup")
    assert_array_equal(found["a.b.weight"].view(np.uint8), tensors["a.b.weight"].view(np.uint8))
    scales = [found["a.b.weight_scale_inv"].view(np.int32), tensors["a.b.weight_scale_inv"].view(np.int32)]
    assert np.abs(scales[0] - scales[1]).max() <= 1


def test_names_can_be_given_and_stacks_be_quantised(tmp_path):
    rng = np.random.default_rng(0)
    array = (rng.standard_normal((3, 130, 200)) * 2.0 ** rng.integers(-140, -20, (3, 130, 200))).astype(np.float32)
    array[0], array[1, :128] = 0, array[1, :128] * np.float32(2.0**-100)
    run = write_checkpoint(tmp_path / "run", {"experts": array, "other": array[0]})
    view = quantised(open_checkpoints([str(run)])[0], {"experts"})
    assert view.table.names == ("experts", "experts_scale_inv", "other")
    expected = expected_of({"experts": array, "other": array[0]}, {"experts"})
    assert (expected["experts_scale_inv"] == 2.0**-126).any()
    for mode, step in itertools.product(("map", "plain"), (4 * 777, 1 << 20)):
        with open_sources([view], mode) as (source,):
            for position, name in enumerate(view.table.names):
                nbytes = int(view.table.nbytes[position])
                room = np.empty(nbytes, np.uint8)
                for first in range(0, nbytes, step):
                    part = memoryview(room)[first : first + step]
                    source.load(position, first, len(part))
                    source.fetch(position, first, len(part), part)
                    source.drop(position, first, len(part))
                assert room.tobytes() == expected[name].tobytes(), (mode, step, name)


def test_a_nan_is_reported_by_name_and_an_infinity_too(tmp_path, quantising):
    for bad in (np.nan, -np.inf):
        tensors = weights(0, BF16)
        tensors["layers.0.k_proj.weight"][5, 7] = bad
        run = write_checkpoint(tmp_path / "run-q", tensors)
        with pytest.raises(NonFiniteError, match=r"k_proj\.weight.*NaN or infinite"):
            streamsoup.soup([str(run)], tmp_path / "soup", restart=True)


@pytest.mark.parametrize(
    ("tensors", "names", "said"),
    [
        ({"norm.weight": np.ones((200, 200), np.float32)}, None, r"run: has no linear weights"),
        ({"a": np.ones((3, 3), np.float32)}, {"a", "b"}, r"b: is not in .*run"),
        ({"a": np.ones(3, np.float32)}, {"a"}, r"a: in .*run, has shape \(3,\)"),
        ({"a": np.ones((0, 3), np.float32)}, {"a"}, r"a: in .*run, has shape \(0, 3\)"),
        ({"a": np.ones((3, 3))}, {"a"}, r"a: in .*run, is F64"),
        ({"a": np.ones((3, 3), np.float32), "a_scale_inv": np.ones(3)}, {"a"}, r"a: in .*run, has a tensor a_scale"),
    ],
)
def test_what_cannot_be_quantised_is_refused(tmp_path, tensors, names, said):
    (checkpoint,) = open_checkpoints([str(write_checkpoint(tmp_path / "run", tensors))])
    with pytest.raises(CheckpointError, match=said):
        quantised(checkpoint, names)


# -- as an option ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soup")
    companions = {"config.json": json.dumps({"torch_dtype": "float32"})}
    return write_checkpoint(folder / "soup", weights(0, np.float32), shards=2, companions=companions)


def test_a_soup_is_quantised_by_option_and_the_dtype_is_that_of_the_rest(tmp_path, soup, cli):
    dry = cli("soup", soup, "-o", "out", "--quantize", "fp8-block", "--dry-run")
    assert "3 weight(s) were quantised" in dry.stdout
    done = cli("soup", soup, "-o", "out", "--quantize", "fp8-block", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    expected = expected_of(weights(0, np.float32), LINEAR)
    for name in SHAPES.keys() - set(LINEAR):
        expected[name] = expected[name].astype(BF16)
    found = read_checkpoint(tmp_path / "out")
    assert same_bits(found, expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "streamsoup.json").read_text())["quantize"] == "fp8-block"
    again = cli("soup", "--recipe", "out/recipe.yaml", "-o", "again")
    assert again.returncode == 0, again.stderr
    assert same_bits(read_checkpoint(tmp_path / "again"), found)


def test_an_interrupted_quantisation_goes_on(tmp_path, soup, monkeypatch):
    def stop(progress):
        if progress.done_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    with pytest.raises(KeyboardInterrupt):
        streamsoup.soup([str(soup)], tmp_path / "out", quantize="fp8-block", workers=1, progress=stop)
    streamsoup.resume(tmp_path / "out")
    assert same_bits(read_checkpoint(tmp_path / "out"), expected_of(weights(0, np.float32), LINEAR))


def test_only_one_checkpoint_is_quantised_as_it_is(soup):
    for options in ({"quantize": "fp4"}, {"dtype": "float8_e4m3fn"}, {"coefficients": [2.0]}):
        with pytest.raises(RecipeError, match=r"^(quantize|dtype): "):
            streamsoup.soup([str(soup)], "out", **{"quantize": "fp8-block", **options})
    with pytest.raises(RecipeError, match="Make the soup first"):
        streamsoup.soup([str(soup), str(soup)], "out", quantize="fp8-block")
