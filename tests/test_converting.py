"""Conversions: bits are copied where the dtype stays, rounded once where it changes, and made like a soup."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from adapter_pools import merged, write_adapter, write_base
from factory import DTYPES, bits, fine_tunes, read_checkpoint, write_checkpoint

import streamsoup
from streamsoup.checkpoints import open_checkpoints
from streamsoup.errors import DestinationError, NonFiniteError, RecipeError, ResumeError
from streamsoup.write import FileSink


def any_bits(dtype, seed, count=5000):
    """Every kind of number there is: signalling and other NaN, infinities, subnormals, zeros of both signs."""
    kind = DTYPES[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, count * kind.itemsize, dtype=np.uint8)
    return (raw % 2).view(np.bool_) if dtype == "BOOL" else raw.view(kind)


@pytest.fixture
def odd(tmp_path):
    """A checkpoint with random bits of every dtype, over three shards."""
    tensors = {name.lower(): any_bits(name, i) for i, name in enumerate(DTYPES) if name != "F8_E8M0"}
    tensors["matrix"] = any_bits("BF16", 99, 300_000).reshape(300, 1000)
    tensors["empty"] = np.empty((0, 4), np.float32)
    return write_checkpoint(tmp_path / "odd", tensors, shards=3), tensors


def same(found, tensors):
    return found.keys() == tensors.keys() and all(
        found[n].dtype == tensors[n].dtype
        and found[n].shape == tensors[n].shape
        and np.array_equal(bits(found[n]), bits(tensors[n]))
        for n in tensors
    )


def test_every_bit_is_copied_where_the_dtype_stays(tmp_path, odd, device, read_mode):
    path, tensors = odd
    result = streamsoup.convert(path, tmp_path / "out", shard_size="100kB", device=device, read_mode=read_mode)
    assert same(read_checkpoint(tmp_path / "out"), tensors)
    assert result.notes == ()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_there_and_back_through_one_file(tmp_path, odd):
    path, tensors = odd
    streamsoup.convert(path, tmp_path / "one.safetensors")
    streamsoup.convert(tmp_path / "one.safetensors", tmp_path / "back", shard_size="50kB", workers=3)
    assert same(read_checkpoint(tmp_path / "back"), tensors)
    assert list(open_checkpoints([str(tmp_path / "one.safetensors")])[0].table.names)


def test_a_cast_is_rounded_once_to_nearest_even_and_keeps_the_sign_of_zero(tmp_path, device):
    numbers = np.random.default_rng(0).standard_normal(70_000).astype(np.float32)
    numbers[:4] = [-0.0, 0.0, 1e-42, -1e-42]
    tensors = {"w": numbers, "h": numbers.astype(ml_dtypes.bfloat16), "ids": np.arange(9), "d": numbers * np.float64(3)}
    source = write_checkpoint(tmp_path / "run", tensors)
    streamsoup.convert(source, tmp_path / "out", dtype="bf16", device=device)
    wanted = {n: t if n == "ids" else t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}
    assert same(read_checkpoint(tmp_path / "out"), wanted)


def test_what_is_not_finite_is_kept_in_a_cast_and_counted_in_one_note(tmp_path):
    nan, infinity = np.float32("nan"), np.float32("inf")
    tensors = {"a": np.array([1, nan, infinity], np.float32), "b": np.array([-infinity, 2], np.float32),
               "same": np.array([nan, 1]).astype(np.float16)}  # fmt: skip
    source = write_checkpoint(tmp_path / "run", tensors)
    result = streamsoup.convert(source, tmp_path / "out", dtype="float16")
    found = read_checkpoint(tmp_path / "out")
    assert np.isnan(found["a"][1])
    assert found["a"][2] == infinity
    assert found["b"][0] == -infinity
    assert result.notes == ("3 NaN or infinite element(s) in 2 tensor(s) were kept, first in a.",)
    with pytest.raises(NonFiniteError, match=r"b: 1 NaN or infinite"):
        streamsoup.convert(source, tmp_path / "no", dtype="float16", nonfinite="error")
    assert len(streamsoup.convert(source, tmp_path / "all", dtype="float16", nonfinite="warn").notes) == 2


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path):
    source = write_checkpoint(tmp_path / "run", {"a": np.array([1e6, np.nan], np.float32)})
    with pytest.raises(NonFiniteError, match=r"^a: 1 element\(s\) of the soup are too large for float16\. Choose"):
        streamsoup.convert(source, tmp_path / "out", dtype="float16")
    streamsoup.convert(source, tmp_path / "yes", dtype="float16", nonfinite="allow")
    assert np.isinf(read_checkpoint(tmp_path / "yes")["a"][0])


def test_companions_come_along_the_dtype_is_corrected_and_the_card_stays_the_networks(tmp_path):
    companions = {"config.json": '{"torch_dtype": "float32", "n": 1}', "tokenizer.json": "{}", "README.md": "# Mine"}
    source = write_checkpoint(tmp_path / "run", {"w": np.ones(3, np.float32)}, companions=companions)
    streamsoup.convert(source, tmp_path / "out", dtype="float16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float16", "n": 1}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine"
    manifest = json.loads((tmp_path / "out" / "streamsoup.json").read_text())
    assert manifest["method"] == "convert"
    assert [i["path"] for i in manifest["ingredients"]] == [str(source)]


def test_a_conversion_can_be_an_ingredient_and_its_recipe_makes_it_again(tmp_path):
    runs = fine_tunes(tmp_path, 2)
    streamsoup.convert(runs[0], tmp_path / "out", shard_size="5kB")
    streamsoup.soup([tmp_path / "out", runs[1]], tmp_path / "soup")
    streamsoup.soup(runs, tmp_path / "wanted")
    assert same(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "wanted"))
    recipe = streamsoup.read_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.method == "convert"


def test_what_is_computed_is_converted_to_the_dtypes_that_people_think_it_has(tmp_path):
    base = write_base(tmp_path / "base")
    whole = merged(base, write_adapter(tmp_path / "lora"))
    source = f"{tmp_path}/base+{tmp_path}/lora"
    streamsoup.convert(source, tmp_path / "out")
    streamsoup.convert(source, tmp_path / "wide", dtype="float32")
    kept = {n: t if n == "ids" else t.astype(ml_dtypes.bfloat16) for n, t in whole.items()}
    assert same(read_checkpoint(tmp_path / "out"), kept)
    wide = {n: t if n == "ids" else t.astype(np.float32) for n, t in whole.items()}
    assert same(read_checkpoint(tmp_path / "wide"), wide)
    for name in ("out", "wide"):
        assert streamsoup.verify(tmp_path / name, sample=None).is_same
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    (problem,) = streamsoup.verify(tmp_path / "out").problems
    assert "lora" in problem
    assert "--ingredients" in problem


def test_files_of_torch_become_safetensors_bit_for_bit(tmp_path):
    import torch

    numbers = torch.from_numpy(any_bits("F32", 3, 6000).copy())
    state = {"w": numbers.reshape(60, 100), "h": numbers[:50].to(torch.bfloat16), "turned": numbers.reshape(100, 60).T}
    torch.save(state, tmp_path / "run.pt")
    streamsoup.convert(tmp_path / "run.pt", tmp_path / "out", shard_size="20kB")
    found = read_checkpoint(tmp_path / "out")
    for name, tensor in state.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        assert found[name].tobytes() == raw.tobytes(), name
    assert streamsoup.verify(tmp_path / "out", sample=None).is_same


def test_weights_are_quantised_and_multiplied_out_again(tmp_path):
    numbers = np.random.default_rng(0).standard_normal((256, 300)).astype(np.float32)
    source = write_checkpoint(tmp_path / "run", {"layers.0.q.weight": numbers, "norm.weight": numbers[0]})
    streamsoup.convert(source, tmp_path / "fp8", quantize="fp8-block", dtype="bfloat16")
    streamsoup.convert(tmp_path / "fp8", tmp_path / "back", dtype="float32")
    found = read_checkpoint(tmp_path / "fp8")
    assert {n: str(t.dtype) for n, t in found.items()} == {
        "layers.0.q.weight": "float8_e4m3fn", "layers.0.q.weight_scale_inv": "float32", "norm.weight": "bfloat16",
    }  # fmt: skip
    assert np.abs(read_checkpoint(tmp_path / "back")["layers.0.q.weight"] - numbers).max() < 0.2
    for name in ("fp8", "back"):
        assert streamsoup.verify(tmp_path / name, sample=None).is_same, name
    numbers[3, 4] = np.nan
    write_checkpoint(tmp_path / "odd", {"layers.0.q.weight": numbers})
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        streamsoup.convert(tmp_path / "odd", tmp_path / "no", quantize="fp8-block")


def test_an_interrupted_conversion_goes_on_to_the_same_bits(tmp_path, odd, cli, monkeypatch):
    path, tensors = odd
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(2048, workers)])
    write, left = FileSink.write, [40]

    def stop(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(FileSink, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        streamsoup.convert(path, tmp_path / "out", workers=1)
    with pytest.raises(ResumeError, match="holds the unfinished work"):
        streamsoup.convert(path, tmp_path / "out")
    done = cli("convert", "--resume", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["bytes_read"] < sum(t.nbytes for t in tensors.values())
    assert not (tmp_path / "out.partial").exists()
    assert same(read_checkpoint(tmp_path / "out"), tensors)


def test_what_stands_in_its_place_is_kept_unless_asked(tmp_path):
    (run,) = fine_tunes(tmp_path, 1)
    streamsoup.convert(run, tmp_path / "out")
    with pytest.raises(DestinationError, match="exists already"):
        streamsoup.convert(run, tmp_path / "out", dtype="float32")
    streamsoup.convert(run, tmp_path / "out", dtype="float32", overwrite=True)
    assert read_checkpoint(tmp_path / "out")["norm.scale"].dtype == np.float32
    with pytest.raises(DestinationError, match="is the ingredient"):
        streamsoup.convert(run, run, overwrite=True)


def test_it_takes_one_checkpoint(tmp_path):
    fine_tunes(tmp_path, 2)
    with pytest.raises(RecipeError, match="takes 1 ingredient"):
        streamsoup.convert(tmp_path / "run*", tmp_path / "out")


# -- command line ------------------------------------------------------------------------------------------------


def test_command_line(cli, tmp_path):
    fine_tunes(tmp_path, 1)
    done = cli("convert", "run1", "out", "--dtype", "float32", "--shard-size", "10kB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: 1 checkpoint, ")
    assert "peak memory" in done.stdout
    streamsoup.convert(tmp_path / "run1", tmp_path / "again", dtype="float32", shard_size=10_000)
    for file in (tmp_path / "again").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_dry_run_prints_the_plan_and_writes_nothing(cli, tmp_path):
    fine_tunes(tmp_path, 1)
    done = cli("convert", "run1", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("conversion of\n    1  run1  source, ")
    assert "4 (4 copied)" in done.stdout
    facts = json.loads(cli("convert", "run1", "out", "--dtype", "float32", "--dry-run", "--json").stdout)
    assert (facts["method"], facts["copied_tensors"]) == ("convert", 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run1"]


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "Name the checkpoint and where it goes"),
        (["run1"], 2, "Name the checkpoint and where it goes"),
        (["run1", "out", "--resume", "out"], 2, "give it alone"),
        (["--resume", "out", "--dtype", "float16"], 2, "of the interrupted run"),
        (["gone", "out"], 1, "gone"),
        (["run1", "run1"], 1, "is the ingredient"),
        (["run1", "out", "--dtype", "int8"], 1, "is not a float dtype"),
    ],
)
def test_an_error_is_one_sentence(cli, tmp_path, arguments, code, part):
    fine_tunes(tmp_path, 1)
    done = cli("convert", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
