"""A base with adapters on it has the bits of the file that would hold the merged float32 weights, by every way."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from adapter_pools import PREFIX, SHAPES, factors, merged, write_adapter, write_base, write_files
from factory import read_checkpoint, same_bits, weights_bytes, write_checkpoint

import streamsoup
from streamsoup.checkpoints import adapters, identify, open_checkpoints, verify_unchanged
from streamsoup.dtypes import BY_NAME
from streamsoup.errors import BudgetError, ChangedIngredientError
from streamsoup.kernels import low_rank
from streamsoup.maps import address_of
from streamsoup.read import open_sources

COUNT = 3


def read_whole(path, mode="map", *, piece=None):
    """Compute a checkpoint, in pieces of so many elements."""
    (checkpoint,) = open_checkpoints([str(path)])
    table, found = checkpoint.table, {}
    with open_sources([checkpoint], mode) as (source,):
        for position, name in enumerate(table.names):
            size, count = table.dtype(position).itemsize, int(table.elements[position])
            room = np.empty(count * size, np.uint8)
            step = piece or max(count, 1)
            for start in range(0, count, step):
                stop = min(count, start + step)
                place = position, start * size, (stop - start) * size
                source.load(*place)
                target = room[start * size : stop * size].data
                assert source.fetch(*place, target) == address_of(target)
                source.drop(*place)
            found[name] = room.tobytes(), table.dtype(position).name, table.shape(position)
    return found


def stored(tensors):
    from factory import dtype_name

    return {n: (a.tobytes(), dtype_name(a), a.shape) for n, a in tensors.items()}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Adapters on one base, and beside each the file of what comes of it."""
    folder = tmp_path_factory.mktemp("adapters")
    base = write_base(folder / "base", shards=2)
    for i in range(COUNT):
        dtype = ("BF16", "F16", "F32")[i]
        extra = {f"{PREFIX}layers.0.q.bias": np.full(48, i, np.float32)}
        adapter = write_adapter(folder / f"lora{i}", seed=i, dtype=dtype, extra=extra, bias="lora_only")
        write_checkpoint(
            folder / f"merged{i}", merged(base, adapter), companions={"config.json": '{"dtype": "bfloat16"}'}
        )
    return folder


def adapted(pool):
    return [f"{pool}/base+{pool}/lora{i}" for i in range(COUNT)]


def files(pool):
    return [str(pool / f"merged{i}") for i in range(COUNT)]


def soup_of(tmp_path, paths, name, **options):
    streamsoup.soup(paths, tmp_path / name, **options)
    return read_checkpoint(tmp_path / name)


# -- one ingredient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_dtypes(tmp_path, base_dtype, dtype):
    base = write_base(tmp_path / "base", base_dtype)
    adapter = write_adapter(tmp_path / "lora", dtype=dtype)
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora") == stored(merged(base, adapter))


@pytest.mark.parametrize("mode", ["map", "ahead", "plain"])
@pytest.mark.parametrize("piece", [None, 4096, 1000, 37])
@pytest.mark.parametrize("rank", [1, 4, 19])
def test_no_bit_depends_on_what_is_fetched(tmp_path, mode, piece, rank):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", rank=rank, lora_alpha=1.5 * rank)
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora", mode, piece=piece) == stored(merged(base, adapter))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["map", "plain"])
def test_little_room_for_factors_changes_nothing(tmp_path, monkeypatch, transposed, mode):
    """Blocks of 32 columns and of 2 rows, and strips of 512 bytes."""
    monkeypatch.setattr(adapters, "_rooms", adapters._Rooms())
    monkeypatch.setattr(adapters, "_RIGHT_NUMBERS", 5 * 32)
    monkeypatch.setattr(adapters, "_LEFT_NUMBERS", 10)
    monkeypatch.setattr(adapters, "STRIP_BYTES", 5 * 32 * 4)
    shape = (70, 130)
    rng = np.random.default_rng(3)
    base = {"w.weight": rng.standard_normal(shape).astype(np.float32)}
    a, b = ((5, 70), (130, 5)) if transposed else ((5, 130), (70, 5))
    names = [f"{PREFIX}w.lora_{x}.weight" for x in "AB"]
    adapter = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip(names, (a, b), strict=True)}
    write_checkpoint(tmp_path / "base", base)
    write_files(tmp_path / "lora", adapter, {"r": 5, "lora_alpha": 5, "fan_in_fan_out": transposed})
    expected = stored(merged(base, adapter, 1.0, transposed=("w",) if transposed else ()))
    for piece in (None, 1111, 64, 7):
        assert read_whole(f"{tmp_path}/base+{tmp_path}/lora", mode, piece=piece) == expected


def test_scales_and_ranks_by_pattern(tmp_path):
    base = write_base(tmp_path / "base")
    config = {
        "use_rslora": True,
        "rank_pattern": {"layers.1.q": 9, "^layers.0.k": 2},
        "alpha_pattern": {r"\d+\.k": 3, "k": 100},
    }
    ranks = {"layers.1.q": 9, "layers.0.k": 2}
    adapter = write_adapter(tmp_path / "lora", rank=4, ranks=ranks, **config)
    scales = {"layers.1.q": 6 / 9**0.5, "layers.0.k": 3 / 2**0.5}
    expected = merged(base, adapter, 6 / 4**0.5, scales=scales)
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora") == stored(expected)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            r".*\.(0|1|2)\..*q",
            r"layers\.\d+\.(?:q|v)",
            r"l\w*s\.[0-9]\.(q|k)?",
            r"(?P<all>layers)\.[^1]\.q",
            "^layers.0+.q$",
        ),
        r".*layers\.([0-9]|[12][0-9]|3[01])\..*(k|q|v|o)",
    ],
)
def test_patterns_may_have_choices(tmp_path, pattern):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", targets=("layers.0.q", "layers.1.q"), alpha_pattern={pattern: 12})
    both = "[12]" in pattern or "d+" in pattern or "(0|1|2)" in pattern or r"\w*" in pattern
    expected = merged(base, adapter, scales={"layers.0.q": 3.0} | ({"layers.1.q": 3.0} if both else {}))
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora") == stored(expected)


def test_patterns_fit_ends_of_names_only(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", alpha_pattern={"layers.0": 1, "s.0.q": 2, "0.q": 12})
    expected = merged(base, adapter, scales={"layers.0.q": 3.0})
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora") == stored(expected)


def test_transposed_linear_modules(tmp_path):
    base = write_base(tmp_path / "base")
    rng = np.random.default_rng(0)
    adapter = {}
    for module in ("layers.0.q", "layers.0.k"):
        adapter |= factors(module, SHAPES[f"{module}.weight"][::-1], 4, rng, "F32")
    write_files(tmp_path / "lora", adapter, {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True})
    expected = merged(base, adapter, transposed=("layers.0.q", "layers.0.k"))
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora") == stored(expected)


@pytest.mark.parametrize("spelling", ["default", "bare"])
def test_other_spellings_of_names(tmp_path, spelling):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora")
    names = {}
    for name in adapter:
        other = name.removeprefix(PREFIX) if spelling == "bare" else name.replace("_A", "_A.default")
        names[name] = other if spelling == "bare" else other.replace("_B", "_B.default")
    write_files(tmp_path / "lora", {names[n]: a for n, a in adapter.items()}, {"r": 4, "lora_alpha": 6})
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora") == stored(merged(base, adapter))


@pytest.mark.parametrize("form", ["head", "head.modules_to_save", "head.modules_to_save.default"])
def test_modules_that_were_trained_whole(tmp_path, form):
    base = write_base(tmp_path / "base")
    head = np.random.default_rng(5).standard_normal((7, 48)).astype(np.float32)
    extra = {f"{PREFIX}{form}.weight": head, f"{PREFIX}head.original_module.weight": head + 1}
    adapter = write_adapter(tmp_path / "lora", extra=extra, modules_to_save=["head"])
    adapter = {n: a for n, a in adapter.items() if ".head" not in n}
    expected = {**merged(base, adapter), "head.weight": head}
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora") == stored(expected)


def test_an_adapter_on_a_layer_that_it_stores_too(tmp_path):
    base = write_base(tmp_path / "base")
    own = np.random.default_rng(5).standard_normal(SHAPES["embed.weight"]).astype(np.float16)
    adapter = write_adapter(tmp_path / "lora", extra={f"{PREFIX}embed.base_layer.weight": own})
    adapter.pop(f"{PREFIX}embed.base_layer.weight")
    expected = merged({**base, "embed.weight": own}, adapter)
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora", piece=500) == stored(expected)


def test_several_adapters_one_after_the_other(tmp_path):
    base = write_base(tmp_path / "base")
    one, two = (write_adapter(tmp_path / f"lora{i}", seed=i) for i in range(2))
    for mode in ("map", "plain", "ahead"):
        found = read_whole(f"{tmp_path}/base+{tmp_path}/lora0+{tmp_path}/lora1", mode, piece=999)
        assert found == stored(merged(merged(base, one), two))


def test_nothing_added_changes_nothing(tmp_path):
    base = write_base(tmp_path / "base", "F32")
    adapter = write_adapter(tmp_path / "lora")
    adapter = {n: a * 0 if "_B" in n else a for n, a in adapter.items()}
    write_files(tmp_path / "lora", adapter, {"r": 4})
    assert read_whole(f"{tmp_path}/base+{tmp_path}/lora") == stored(base)


def test_picked_layers_with_an_adapter(tmp_path):
    """The adapter's layers are those of what was put together."""
    base = write_base(tmp_path / "base")
    rng = np.random.default_rng(0)
    adapter = factors("layers.0.q", SHAPES["layers.1.q.weight"], 4, rng, "F32")
    write_files(tmp_path / "lora", adapter, {"r": 4, "lora_alpha": 6})
    found = read_whole(f"{tmp_path}/base[1:2]+{tmp_path}/lora")
    moved = merged({"layers.0.q.weight": base["layers.1.q.weight"]}, adapter)
    assert found["layers.0.q.weight"] == stored(moved)["layers.0.q.weight"]
    assert not [name for name in found if name.startswith("layers.1")]


def test_lanes_are_those_of_the_kernel():
    assert adapters._LANES == low_rank.LANES


# -- soups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read_mode", "workers", "device"), list(itertools.product(["map", "ahead", "plain"], [1, 3], ["cpu", "torch:cpu"]))
)
def test_a_soup_has_the_bits_of_the_merged_files(tmp_path, pool, read_mode, workers, device, monkeypatch):
    expected = soup_of(tmp_path, files(pool), "expected", dtype="bfloat16")
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    found = soup_of(tmp_path, adapted(pool), "found", read_mode=read_mode, workers=workers, device=device)
    assert same_bits(found, expected)


@pytest.mark.parametrize("method", ["karcher", "ties", "task_arithmetic"])
def test_methods_with_the_base_as_base(tmp_path, pool, method):
    options = {"method": method, "base": str(pool / "base"), "dtype": "float32"}
    found, expected = (
        soup_of(tmp_path, paths, str(i), **options) for i, paths in enumerate((adapted(pool), files(pool)))
    )
    assert same_bits(found, expected)


def test_adapters_beside_whole_checkpoints(tmp_path, pool):
    mixed = [adapted(pool)[0], files(pool)[1]]
    found, expected = soup_of(tmp_path, mixed, "a"), soup_of(tmp_path, files(pool)[:2], "b", dtype="bfloat16")
    assert same_bits(found, expected)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_greedy(tmp_path, pool, place):
    results = []
    for kind, paths in (("adapted", adapted(pool)), ("files", files(pool))):
        scores = iter([3.0, 2.0, 1.0, 4.0, 0.0])
        result = streamsoup.greedy(
            paths,
            score=lambda candidate, scores=scores: next(scores),
            out=tmp_path / kind,
            sums=place,
            workdir=tmp_path / f"{kind}.work",
            dtype="bfloat16",
        )
        results.append([(trial.accepted, trial.score) for trial in result.trials])
    assert results[0] == results[1]
    assert [accepted for accepted, _ in results[0]] == [True, True, False]
    assert same_bits(read_checkpoint(tmp_path / "adapted"), read_checkpoint(tmp_path / "files"))
    recipe = streamsoup.read_recipe(tmp_path / "adapted" / "recipe.yaml")
    assert [i.path for i in recipe.ingredients] == adapted(pool)[:2]


def test_the_recipe_of_relative_paths_makes_the_soup_again(tmp_path, pool, monkeypatch):
    from streamsoup.cook import cook

    monkeypatch.chdir(pool)
    found = soup_of(tmp_path, ["base+lora0", "base+lora1"], "found")
    monkeypatch.chdir(tmp_path)
    recipe = streamsoup.read_recipe(tmp_path / "found" / "recipe.yaml")
    assert [i.path for i in recipe.ingredients] == adapted(pool)[:2]
    cook(recipe, tmp_path / "again", streamsoup.Execution())
    assert weights_bytes(tmp_path / "again") == weights_bytes(tmp_path / "found")
    assert len(found) == len(SHAPES) + 1


def test_configuration_files_are_those_of_the_base(tmp_path, pool):
    soup_of(tmp_path, adapted(pool), "found")
    assert (tmp_path / "found" / "config.json").exists()
    assert not (tmp_path / "found" / "adapter_config.json").exists()


class StopError(Exception):
    pass


@pytest.mark.parametrize("kept", [1.0, 0.4])
def test_resuming_from_another_folder(tmp_path, pool, monkeypatch, kept):
    """With all tiles done, and with those that the first part of the journal knows of."""
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(2048, workers)])
    expected = soup_of(tmp_path, adapted(pool), "expected")

    def stop(*_, **__):
        raise StopError

    with monkeypatch.context() as patch:
        patch.chdir(pool)
        patch.setattr("streamsoup.workspace.Workspace.publish", stop)
        with pytest.raises(StopError):
            streamsoup.soup([f"base+lora{i}" for i in range(COUNT)], tmp_path / "found")
    journal = tmp_path / "found.partial" / "journal"
    os.truncate(journal, int(kept * journal.stat().st_size))
    monkeypatch.chdir(tmp_path)
    result = streamsoup.resume(tmp_path / "found")
    assert bool(result.bytes_read) == (kept < 1)
    assert same_bits(read_checkpoint(tmp_path / "found"), expected)


def test_another_alpha_is_noticed(tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "lora")
    (checkpoint,) = open_checkpoints([f"{tmp_path}/base+{tmp_path}/lora"])
    before = identify(checkpoint)
    assert len(before) == 3
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 64}))
    with pytest.raises(ChangedIngredientError, match=r"adapter_config\.json"):
        verify_unchanged(checkpoint)
    (again,) = open_checkpoints([f"{tmp_path}/base+{tmp_path}/lora"])
    assert identify(again)[2].header_sha256 != before[2].header_sha256


def test_what_is_held_meanwhile_counts_in_the_budget(tmp_path, pool):
    execution = streamsoup.Execution(workers=2, budget_bytes=1 << 28, read_mode="plain")
    recipe = streamsoup.Recipe(tuple(map(streamsoup.Ingredient, adapted(pool))))
    plan, _ = streamsoup.plan_soup(recipe, None, execution)
    (one,) = {c.scratch_bytes for c in plan.checkpoints}
    assert plan.needs.reserved_bytes == (2 + plan.needs.readers) * one
    twice = replace(recipe, ingredients=(streamsoup.Ingredient(f"{adapted(pool)[0]}+{pool}/lora1"),))
    assert streamsoup.plan_soup(twice, None, execution)[0].needs.reserved_bytes == 2 * plan.needs.reserved_bytes
    with pytest.raises(BudgetError):
        streamsoup.soup(adapted(pool), tmp_path / "soup", budget_bytes="9MiB")


def test_memory_stays_under_the_budget_for_any_number(tmp_path, pool):
    paths = adapted(pool) * 16
    result = streamsoup.soup(paths, tmp_path / "soup", budget_bytes="40MiB", read_mode="plain", workers=2)
    assert result.ingredients == 16 * COUNT
    assert result.measured_peak_bytes <= result.projected_peak_bytes <= 40 << 20


def test_a_thread_holds_no_more_than_it_says(tmp_path):
    """Wide, high and of a high rank: neither the weight nor a factor is ever whole."""
    import tracemalloc

    rng = np.random.default_rng(0)
    write_checkpoint(tmp_path / "base", {"w.weight": rng.standard_normal((40, 40_000)).astype(np.float32)})
    shapes = {"A": (900, 40_000), "B": (40, 900)}
    adapter = {f"w.lora_{x}.weight": np.zeros(s, np.float32) for x, s in shapes.items()}
    write_files(tmp_path / "lora", adapter, {"r": 900})
    (checkpoint,) = open_checkpoints([f"{tmp_path}/base+{tmp_path}/lora"])
    checkpoint.prepare()
    room = np.empty(4 * 60_000, np.uint8)
    with open_sources([checkpoint], "plain") as (source,):
        adapters._rooms.free.clear()
        tracemalloc.start()
        source.fetch(0, 4 * 39_000, 4 * 60_000, room.data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= checkpoint.scratch_bytes + (64 << 10)
    assert BY_NAME["F32"].index == checkpoint.table.dtypes[0]


# -- command line ------------------------------------------------------------------------------------------------


def streamsoup_cli(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "streamsoup", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_command_line(tmp_path, pool):
    expected = soup_of(tmp_path, files(pool), "expected", dtype="bfloat16")
    done = streamsoup_cli("soup", "base+lora*", "-o", tmp_path / "found", cwd=pool)
    assert done.returncode == 0, done.stderr
    assert "note" not in done.stdout
    assert same_bits(read_checkpoint(tmp_path / "found"), expected)
    done = streamsoup_cli("soup", "base+lora0:3", "base+lora1:1", "-o", tmp_path / "weighted", cwd=pool)
    assert done.returncode == 0, done.stderr
    expected = soup_of(tmp_path, files(pool)[:2], "w", weights=[3, 1], dtype="bfloat16")
    assert same_bits(read_checkpoint(tmp_path / "weighted"), expected)


def test_adapters_alone_have_a_note(tmp_path, pool):
    done = streamsoup_cli("soup", "lora0", "lora1", "--dry-run", "-o", tmp_path / "soup", cwd=pool)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("give base+adapter for each") == 1
    done = streamsoup_cli("soup", "lora0", "lora1", "-o", tmp_path / "soup", cwd=pool)
    assert done.stdout.count("give base+adapter for each") == 1


def test_inspect(pool):
    done = streamsoup_cli("inspect", "base+lora0", "base", cwd=pool)
    assert done.returncode == 0, done.stderr
    assert "All 2 fit together" in done.stdout
    assert "base+lora0" in done.stdout
