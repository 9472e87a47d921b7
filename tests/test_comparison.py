"""Comparisons against dense float64 computations, on every way to run them; and what is said of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from factory import DTYPES, FLOATS, any_bits, fine_tunes, write_checkpoint, write_sparse

import streamsoup
from streamsoup.comparison_figures import other_lineages
from streamsoup.comparison_gathering import layer_name
from streamsoup.comparison_page import NOT_PROVED, render_page
from streamsoup.errors import BudgetError, MismatchError, RecipeError, StreamsoupError
from streamsoup.kernels import measuring
from streamsoup.measurement import TreeSum
from streamsoup.tiling import BLOCK_ELEMENTS

SHAPES = {
    "layers.0.w": (70, 300),
    "layers.0.b": (300,),
    "layers.1.w": (40, 3, 5, 7),
    "layers.10.w": (9000,),
    "embed.weight": (33, 1001),
    "frozen": (77,),
    "empty": (0, 3),
    "one": (1,),
}
KINDS = ("F32", "BF16", "F16", "F32", "BF16")
LAYERS = {"embed": ["embed.weight"], "layers.0": ["layers.0.w", "layers.0.b"], "layers.1": ["layers.1.w"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base and four checkpoints of unlike dtypes around another centre: paths and float64 arrays."""
    folder = tmp_path_factory.mktemp("comparison")
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    shift = {name: 0.1 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    paths, dense = [], []
    for i, kind in enumerate(KINDS):
        tensors = {}
        for name, shape in SHAPES.items():
            values = base[name].copy()
            if i and name != "frozen":
                values += shift[name] + 0.05 * rng.standard_normal(shape) * (rng.random(shape) < 0.7)
            # Few bits, so that dtypes lose nothing and some elements are equal.
            tensors[name] = (np.round(values * 64) / 64).astype(DTYPES[kind])
        paths.append(str(write_checkpoint(folder / f"run{i}", {**tensors, "ids": np.arange(3)})))
        dense.append({name: array.astype(np.float64) for name, array in tensors.items()})
    return paths, dense


def expected_of(names, tensors, base):
    """All figures of some tensors, by numpy."""
    rows = np.stack([np.concatenate([t[n].ravel() for n in names]) for t in tensors])
    mean = rows.mean(axis=0)
    centre = mean if base is None else np.concatenate([base[n].ravel() for n in names])
    deltas = rows - centre
    from_base = None if base is None else rows - centre
    conflicts = 0 if base is None else int(((from_base > 0).any(axis=0) & (from_base < 0).any(axis=0)).sum())
    start = rows[0] if base is None else centre
    return {
        "elements": rows.shape[1],
        "norms": np.linalg.norm(rows, axis=1),
        "to_base": None if base is None else np.linalg.norm(deltas, axis=1),
        "to_mean": np.linalg.norm(rows - mean, axis=1),
        "distances": np.linalg.norm(rows[:, None] - rows[None], axis=2),
        "gram": deltas @ deltas.T,
        "products": rows @ rows.T,
        "cosines": _cosines(deltas),
        "weight_cosines": _cosines(rows),
        "variance": float(rows.var(axis=0).mean()),
        "relative_spread": float(np.sqrt(((rows - mean) ** 2).sum() / (rows**2).sum())),
        "varying": int((rows != rows[0]).any(axis=0).sum()),
        "moved": int((rows != start).any(axis=0).sum()),
        "conflicts": conflicts,
    }


def _cosines(rows):
    norms = np.linalg.norm(rows, axis=1)
    return rows @ rows.T / np.outer(norms, norms)


def assert_figures(figures, expected, but=()):
    for name, value in expected.items():
        if name in but:
            continue
        found = getattr(figures, name)
        if value is None:
            assert found is None, name
        elif isinstance(value, int):
            assert found == value, name
        else:
            np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-9 * np.abs(value).max(), err_msg=name)


@pytest.fixture(params=["whole", "tiles"])
def _tiles(request, monkeypatch):
    """Each tensor in one tile, and tensors in many."""
    if request.param == "tiles":
        monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(BLOCK_ELEMENTS, workers)])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("has_base", [True, False])
def test_every_figure_is_what_a_dense_computation_gives(runs, device, has_base):
    paths, dense = runs
    base = dense[0] if has_base else None
    found = streamsoup.compare(paths[1:], paths[0] if has_base else None, device=device)
    but = () if has_base else ("moved", "conflicts")
    assert_figures(found.whole, expected_of(list(SHAPES), dense[1:], base), but)
    for layer, names in LAYERS.items():
        assert_figures(found.layers[layer], expected_of(names, dense[1:], base), but)
    assert list(found.layers) == ["embed", "empty", "frozen", "layers.0", "layers.1", "layers.10", "one"]
    for t, name in enumerate(found.tensors.names):
        if not dense[0][name].size:
            continue
        expected = expected_of([name], dense[1:], base) if name != "frozen" else None
        if expected is None:
            assert found.tensors.varying[t] == found.tensors.moved[t] == 0
            assert not found.tensors.to_mean[t].any()
            continue
        np.testing.assert_allclose(found.tensors.norms[t], expected["norms"], rtol=1e-12)
        np.testing.assert_allclose(found.tensors.to_mean[t], expected["to_mean"], rtol=1e-10, atol=1e-12)
        assert found.tensors.varying[t] == expected["varying"]
        if has_base:
            np.testing.assert_allclose(found.tensors.to_base[t], expected["to_base"], rtol=1e-12)
            assert (found.tensors.moved[t], found.tensors.conflicts[t]) == (expected["moved"], expected["conflicts"])
    assert [n for n, same in zip(found.tensors.names, found.tensors.identical, strict=True) if same] == [
        "frozen", "empty",
    ]  # fmt: skip
    assert found.identical_parameters == 77
    assert found.bytes_read == sum(
        sum(a.size for a in t.values()) * DTYPES[k].itemsize + 24
        for t, k in list(zip(dense, KINDS, strict=True))[0 if has_base else 1 :]
    )


WAYS = [
    ("map", 1, "cpu", 64), ("map", 3, "cpu", 1), ("ahead", 2, "cpu", 8), ("plain", 2, "cpu", 16),
    ("map", 1, "torch:cpu", 8), ("plain", 2, "torch:cpu", 3), ("map", 2, "torch:cpu,torch:cpu", 64),
]  # fmt: skip


@pytest.mark.parametrize("has_base", [True, False])
def test_bits_do_not_depend_on_tiles_threads_reading_or_device(runs, monkeypatch, has_base):
    paths, _ = runs
    found = []
    for mode, workers, device, blocks in WAYS:
        with monkeypatch.context() as patch:
            patch.setattr("streamsoup.tiling._preferences", lambda n, b=blocks: [(b * BLOCK_ELEMENTS, n)])
            comparison = streamsoup.compare(
                paths[1:], paths[0] if has_base else None, read_mode=mode, workers=workers, device=device,
                device_budget_bytes="24MiB" if "," in device else None,
            )  # fmt: skip
        document = comparison.to_json(tensors=True)
        for how in ("seconds", "engine_seconds", "gb_per_s", "read_mode", "device"):
            document.pop(how)
        found.append(document)
    assert all(document == found[0] for document in found)


# -- the kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, "mixed"])
@pytest.mark.parametrize("count", [2, 3, 8, 17])
@pytest.mark.parametrize("based", [True, False])
def test_survey_has_the_bits_of_plain_operations(dtype, count, based):
    import torch

    from streamsoup.kernels import codes, torch_combine, torch_measuring

    rng = np.random.default_rng(count)
    kinds = [("BF16", "F32", "F8_E4M3", "F64", "F16")[k % 5] if dtype == "mixed" else dtype for k in range(count)]
    elements = 2 * BLOCK_ELEMENTS + 77
    arrays = [any_bits(rng, kind, (elements + 1,)) for kind in kinds]
    arrays[-1] = arrays[0].astype(arrays[-1].dtype)
    with np.errstate(invalid="ignore"):
        arrays[-1][~np.isfinite(arrays[-1].astype(np.float64))] = 0
    numbers = np.array([getattr(codes, kind) for kind in kinds], np.uint8)
    raw = [b"x" + array.tobytes() for array in arrays]  # misaligned
    memory = [np.frombuffer(bytes_, np.uint8) for bytes_ in raw]
    addresses = np.array([m.ctypes.data + 1 for m in memory], np.uint64)
    digests, nonfinite = np.zeros(count, np.uint64), np.zeros(count, np.int64)
    found = measuring.survey(
        addresses, numbers, 0, elements, 3, based=based, digests=digests, nonfinite=nonfinite
    )  # fmt: skip
    rows = np.stack([a[:elements].astype(np.float64) for a in arrays])
    with np.errstate(all="ignore"):
        expected = torch_measuring.survey(torch.from_numpy(rows.copy()), based=based).numpy()
    assert found.tobytes() == expected.tobytes() or np.array_equal(found, expected, equal_nan=True)
    assert not nonfinite.any()
    for k, array in enumerate(arrays):
        whole = torch.from_numpy(array[:elements].view(np.uint8).copy())
        assert int(digests[k]) == int(torch_combine.digest(whole, array.itemsize, 3)) % 2**64


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9, 17, 26])
def test_survey_of_fine_tunes_has_the_bits_of_plain_operations(dtype, count):
    """Most strips have differences that float32 holds; some have one that lies just beyond."""
    import torch

    from streamsoup.kernels import codes, torch_measuring

    rng = np.random.default_rng(count)
    mantissa, top = (7, 122) if dtype == "BF16" else (10, 28)
    shape = count, 4 * BLOCK_ELEMENTS
    start = rng.integers(top - 4 << mantissa, top << mantissa, shape[1], dtype=np.uint16)
    stored = start ^ rng.integers(0, 8, shape, dtype=np.uint16)
    stored[rng.integers(0, count, 99), rng.integers(0, shape[1], 99)] = rng.choice(np.uint16([0, 0x8000]), 99)
    for gap, element in enumerate(range(100, shape[1], 350)):  # some strips have none
        largest = (top + 1 << mantissa) - 1
        stored[:, element] = largest
        stored[1, element] = 0x8000 + largest - (gap << mantissa)
    words = stored.astype(np.uint32) << 16
    rows = (words.view(np.float32) if dtype == "BF16" else stored.view(np.float16)).astype(np.float64)
    addresses = np.array([row.ctypes.data for row in stored], np.uint64)
    kinds = np.full(count, getattr(codes, dtype), np.uint8)
    spare = np.zeros(count, np.uint64), np.zeros(count, np.int64)
    found = measuring.survey(addresses, kinds, 0, shape[1], 0, based=True, digests=spare[0], nonfinite=spare[1])
    expected = torch_measuring.survey(torch.from_numpy(rows.copy()), based=True).numpy()
    assert found.tobytes() == expected.tobytes()


def test_counts_are_of_the_numbers_whatever_their_differences_round_to():
    values = np.array([[1.0, 1.0, 0.0], [2.0**-120, -0.0, -0.0], [2.0**-130, 0.0, 0.0]], np.float64)
    addresses = np.array([row.ctypes.data for row in values], np.uint64)
    spare = np.zeros(3, np.uint64), np.zeros(3, np.int64)
    found = measuring.survey(
        addresses, np.full(3, 3, np.uint8), 0, 3, 0, based=True, digests=spare[0], nonfinite=spare[1]
    )  # fmt: skip
    assert found[0, -3:].tolist() == [1.0, 2.0, 0.0]


def test_survey_counts_what_is_not_finite():
    rows = np.ones((3, 5000), np.float32)
    rows[1, [0, 2048, 4999]] = np.nan, np.inf, -np.inf
    rows[2, 4998] = np.nan
    addresses = np.array([row.ctypes.data for row in rows], np.uint64)
    digests, nonfinite = np.zeros(3, np.uint64), np.zeros(3, np.int64)
    measuring.survey(
        addresses, np.full(3, 2, np.uint8), 0, 5000, 0, based=True, digests=digests, nonfinite=nonfinite
    )  # fmt: skip
    assert nonfinite.tolist() == [0, 3, 1]


@pytest.mark.parametrize("first", [0, 1, 5, 6, 63])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 31, 64])
def test_a_run_of_blocks_adds_up_as_one_by_one(first, count):
    values = np.random.default_rng(count).standard_normal((first + count, 2))
    together, apart = TreeSum(), TreeSum()
    for tree in (together, apart):
        for number in range(first):
            tree.add(number, values[number])
    together.add_run(first, values[first:])
    for number in range(first, first + count):
        apart.add(number, values[number])
    if len(values):
        assert together.total().tobytes() == apart.total().tobytes()


# -- what stands out ---------------------------------------------------------------------------------------------


def test_copies_are_found_whatever_their_shards(tmp_path):
    paths = fine_tunes(tmp_path, 3)
    shutil.copytree(paths[1], tmp_path / "again")
    found = streamsoup.compare([*paths, str(tmp_path / "again")], paths[0])
    assert found.twin_of == (None, None, None, 1)
    assert found.is_base == (True, False, False, False)
    assert found.remarks(3) == ["identical to run2"]
    assert found.remarks(0) == ["identical to the base"]
    assert found.whole.distances[1, 3] == 0
    assert found.whole.to_base[0] == 0
    assert len(set(found.content_digests)) == 3
    assert found.labels == ("run1", "run2", "run3", "again")
    twice = streamsoup.compare([paths[0], paths[0], tmp_path / "again"])
    assert twice.labels == ("run1", "run1", "again")
    assert twice.twin_of == (None, 0, None)


def test_copies_alone_are_at_no_distance(tmp_path):
    (path,) = fine_tunes(tmp_path, 1)
    for name in ("a", "b"):
        shutil.copytree(path, tmp_path / name)
    found = streamsoup.compare([tmp_path / "a", tmp_path / "b", path])
    assert not found.whole.distances.any()
    assert not found.whole.to_mean.any()
    assert found.whole.varying == 0
    assert found.tensors.identical.all()
    assert np.isnan(found.whole.cosines).all()
    json.dumps(found.to_json(tensors=True), allow_nan=False)
    assert "<svg" in render_page(found)


def test_another_lineage_is_found_and_none_where_there_is_none(tmp_path):
    from factory import SHAPES as SMALL
    from factory import realistic

    kin = fine_tunes(tmp_path, 4)
    assert streamsoup.compare(kin).other_lineage == (False,) * 4
    stranger = str(write_checkpoint(tmp_path / "stranger", realistic(0, SMALL, base=9)))
    found = streamsoup.compare([kin[0], stranger, *kin[1:]])
    assert found.other_lineage == (False, True, False, False, False)
    assert found.remarks(1) == ["looks like another lineage"]
    assert np.isnan(found.points[1]).all()
    assert np.isfinite(found.points[[0, 2, 3, 4]]).all()


def test_of_two_halves_neither_is_another_lineage_and_copies_count_once():
    places = np.array([0.0, 0.1, 0.2, 9.0, 9.1, 9.2])
    distances = abs(places[:, None] - places)
    assert other_lineages(distances, (None,) * 6) == (False,) * 6
    assert other_lineages(distances[:4, :4], (None,) * 4) == (False, False, False, True)
    copies = abs((places := np.array([0.0, 0.1, 9.0, 9.0, 9.0]))[:, None] - places)
    assert other_lineages(copies, (None, None, None, 2, 2)) == (False, False, True, True, True)


def test_nan_is_counted_and_its_tensor_is_left_out_of_the_sums(runs, tmp_path):
    paths, dense = runs
    spoilt = {name: array.astype(np.float32) for name, array in dense[1].items()}
    spoilt["layers.0.w"][3, 5:8] = np.nan, np.inf, 1.0
    path = write_checkpoint(tmp_path / "spoilt", {**spoilt, "ids": np.arange(3)})
    found = streamsoup.compare([path, *paths[2:]], paths[0])
    assert found.nonfinite.tolist() == [2, 0, 0, 0]
    assert found.base_nonfinite == 0
    assert found.whole.left_out == found.layers["layers.0"].left_out == 1
    names = [name for name in SHAPES if name != "layers.0.w"]
    assert_figures(found.whole, expected_of(names, dense[1:], dense[0]))
    assert_figures(found.layers["layers.0"], expected_of(["layers.0.b"], dense[1:], dense[0]))
    assert found.remarks(0) == ["has NaN or infinity"]
    json.dumps(found.to_json(tensors=True), allow_nan=False)


def test_a_tensor_whose_squares_are_too_large_is_left_out(tmp_path):
    paths = [str(write_checkpoint(tmp_path / f"r{i}", {"a": np.full(3, i * 1e200), "b": np.ones(4)})) for i in (1, 2)]
    found = streamsoup.compare(paths)
    assert (found.whole.left_out, found.whole.elements) == (1, 4)
    assert not found.nonfinite.any()


def test_tensors_that_are_not_floats_are_compared_by_their_bytes(tmp_path):
    paths = [
        str(write_checkpoint(tmp_path / name, {"w": np.ones(3, np.float32) * i, "ids": np.arange(3) + shift}))
        for i, (name, shift) in enumerate([("base", 1), ("a", 0), ("b", 0), ("c", 2)])
    ]
    assert streamsoup.compare(paths[1:3], paths[0]).differing_buffers == ()
    assert streamsoup.compare(paths[1:], paths[0]).differing_buffers == ("ids",)


def test_the_map_keeps_the_distances_of_a_plane(tmp_path):
    rng = np.random.default_rng(0)
    places = rng.standard_normal((5, 2))
    axes = np.linalg.qr(rng.standard_normal((300, 2)))[0]
    paths = [str(write_checkpoint(tmp_path / f"r{i}", {"w": axes @ place})) for i, place in enumerate(places)]
    found = streamsoup.compare(paths[1:], paths[0])
    assert found.points_share == pytest.approx(1)
    points = found.points
    assert found.points[:4].mean(axis=0) == pytest.approx([0, 0], abs=1e-9)
    expected = np.linalg.norm(places[:, None] - places, axis=2)[[1, 2, 3, 4, 0]][:, [1, 2, 3, 4, 0]]
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points, axis=2), expected, atol=1e-6)


def test_layers_are_named_by_their_first_number():
    assert layer_name("model.layers.12.mlp.experts.3.up.weight") == "model.layers.12"
    assert layer_name("0.weight") == "0"
    assert layer_name("model.norm.weight") == "model.norm"
    assert layer_name("logit_scale") == "logit_scale"


# -- limits and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["map", "plain"])
@pytest.mark.parametrize("count", [3, 40])
def test_a_comparison_owns_no_more_than_its_budget(tmp_path, mode, count):
    path = str(write_sparse(tmp_path / "run.safetensors", {"w": ("BF16", (3000, 1000)), "v": ("BF16", (200_003,))}))
    with pytest.raises(BudgetError) as error:
        streamsoup.compare([path] * count, budget_bytes=1 << 20, read_mode=mode)
    budget = error.value.least_bytes
    script = (
        "import streamsoup, sys\n"
        f"found = streamsoup.compare([{path!r}] * {count}, budget_bytes={budget}, read_mode={mode!r})\n"
        f"sys.exit(0 if found.measured_peak_bytes <= found.projected_peak_bytes <= {budget} else "
        "f'{found.measured_peak_bytes} {found.projected_peak_bytes}')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_compared_is_refused_in_one_sentence(tmp_path):
    paths = fine_tunes(tmp_path, 2)
    other = str(write_checkpoint(tmp_path / "other", {"w": np.ones(3, np.float32)}))
    with pytest.raises(RecipeError, match="one ingredient to compare"):
        streamsoup.compare(paths[:1])
    with pytest.raises(MismatchError, match=r"embed\.weight"):
        streamsoup.compare([*paths, other])
    with pytest.raises(MismatchError, match="other"):
        streamsoup.compare(paths, other)


# -- the command line --------------------------------------------------------------------------------------------


def test_the_table_says_what_stands_out(cli, tmp_path):
    paths = fine_tunes(tmp_path, 3)
    shutil.copytree(paths[1], tmp_path / "again")
    done = cli("inspect", "--compare", *paths[1:], tmp_path / "again", "--base", paths[0])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("3 ingredients, ")
    assert "to base  to mean  cosine  NaN/Inf" in lines[2]
    assert [line.split()[0] for line in lines[3:6]] == ["run2", "run3", "again"]
    assert lines[5].endswith("identical to run2")
    assert "Cosines between the differences:" in done.stdout
    assert "sign conflict" in done.stdout
    assert "Layers that differ most:" in done.stdout
    assert done.stdout.isascii()
    assert max(map(len, lines[1:])) <= 80
    assert "All tensors:" not in done.stdout
    assert "layer.0.bias" in cli("inspect", "--compare", *paths, "--tensors").stdout


def test_json_holds_all_that_the_python_function_gives(cli, tmp_path):
    paths = fine_tunes(tmp_path, 3)
    done = cli("inspect", "--compare", "--json", *paths[1:], "--base", paths[0], "--threads", 1, "--budget", "200MiB")
    document = json.loads(done.stdout)
    assert document["whole"] == streamsoup.compare(paths[1:], paths[0]).to_json()["whole"]
    assert [i["label"] for i in document["ingredients"]] == ["run2", "run3"]
    assert "tensors" not in document


def test_the_page_needs_nothing_but_itself_and_says_what_is_not_proved(cli, tmp_path):
    from factory import SHAPES as SMALL
    from factory import realistic

    paths = fine_tunes(tmp_path, 3)
    odd = str(write_checkpoint(tmp_path / "<b>odd</b>", realistic(0, SMALL, base=5)))
    done = cli("inspect", "--compare", *paths, odd, "--base", paths[0], "--html", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    outside = set(re.findall(r"https?://[^\"' )<]+", page))
    assert outside <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(", page)
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "<b>odd</b>" not in page
    assert "&lt;b&gt;odd" in page
    assert "prefers-color-scheme:dark" in page
    assert NOT_PROVED[0].split(".")[0] in page
    from xml.etree import ElementTree

    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    ("options", "part", "code"),
    [
        (["--base", "run1"], "belongs to --compare", 2),
        (["--html", "x.html"], "belongs to --compare", 2),
        (["--compare", "--html", "x.png"], "ends in .html", 1),
        (["--compare", "--html", "no/where.html"], "no folder", 1),
        (["--compare", "--budget", "1KiB"], "too small", 1),
        (["--compare", "--device", "abacus"], "neither cpu nor cuda", 1),
        (["--compare", "--base", "nothing"], "nothing", 1),
    ],
)
def test_an_error_is_one_sentence(cli, tmp_path, options, part, code):
    paths = fine_tunes(tmp_path, 2)
    done = cli("inspect", *paths, *options)
    assert done.returncode == code
    assert done.stdout == ""
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_one_ingredient_is_an_error_of_one_sentence(cli, tmp_path):
    (path,) = fine_tunes(tmp_path, 1)
    done = cli("inspect", "--compare", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"streamsoup: There is one ingredient to compare ({path}); name another.\n"


def test_a_page_is_refused_before_anything_is_read(tmp_path):
    from streamsoup.comparison_page import check_page

    with pytest.raises(StreamsoupError, match="ends in"):
        check_page(tmp_path / "page.txt")
