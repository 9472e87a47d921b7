"""The command line: exit codes, one plain line for an error, what is printed, what is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from factory import SHAPES, fine_tunes, read_checkpoint, realistic, same_bits, weights_bytes, write_checkpoint

import streamsoup
from streamsoup.cli.soup import _split_weight
from streamsoup.units import parse_bytes


def assert_one_sentence(done, *parts, code=1):
    """Nothing on standard output, one line on standard error, no traceback."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("streamsoup: ")
    for part in parts:
        assert part in lines[0]


# -- imports -----------------------------------------------------------------------------------------------------

HEAVY = ("torch", "numba", "zarr", "numpy", "llvmlite", "yaml", "rich", "psutil", "matplotlib", "transformers")


@pytest.mark.parametrize(
    "code",
    [
        "import streamsoup",
        "import streamsoup; dir(streamsoup); streamsoup.__version__",
        "from streamsoup.cli import build_parser; build_parser().format_help()",
        "from streamsoup.cli import main; main(['--help'])",
        "from streamsoup.cli import main; main(['soup', '--help'])",
        "from streamsoup.cli import main; main(['inspect', '--help'])",
        "from streamsoup.cli import main; main(['--version'])",
    ],
)
def test_help_and_import_load_nothing_heavy(code):
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\nsys.exit(f'imported {{heavy}}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cpu_soup_does_not_import_torch_or_zarr(tmp_path):
    runs = fine_tunes(tmp_path, 2)
    script = (
        "import sys, streamsoup\n"
        f"streamsoup.soup({runs!r}, {str(tmp_path / 'soup')!r})\n"
        "sys.exit(' '.join(m for m in ('torch', 'zarr', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# -- soup --------------------------------------------------------------------------------------------------------


def test_uniform_soup(cli, tmp_path):
    fine_tunes(tmp_path, 3)
    done = cli("soup", "run1", "run2", "run3", "-o", "soup")
    assert done.returncode == 0, done.stderr
    assert "3 checkpoints" in done.stdout
    assert "GB/s" in done.stdout
    assert "peak memory" in done.stdout
    streamsoup.soup([tmp_path / f"run{i}" for i in (1, 2, 3)], tmp_path / "again")
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "again")


def test_weights_dtype_budget_and_shard_size(cli, tmp_path):
    runs = fine_tunes(tmp_path, 2)
    done = cli(
        "soup", "run1:0.7", "run2:0.3", "-o", "soup", "--budget", "64MiB", "--dtype", "bfloat16", "--shard-size", "8kB"
    )
    assert done.returncode == 0, done.stderr
    streamsoup.soup(runs, tmp_path / "again", weights=[0.7, 0.3], dtype="bfloat16", shard_size=8000)
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "again")
    assert len(list((tmp_path / "soup").glob("*.safetensors"))) == 2


def test_coefficients(cli, tmp_path):
    runs = fine_tunes(tmp_path, 3)
    done = cli("soup", "--coefficients", "run1:-1", "run2", "run3:1", "-o", "soup")
    assert done.returncode == 0, done.stderr
    streamsoup.soup(runs, tmp_path / "again", coefficients=[-1, 1, 1])
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "again")


def test_a_recipe_file_is_the_same_as_arguments(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    (tmp_path / "recipe.yaml").write_text(
        "ingredients:\n- {path: run1, weight: 2}\n- run2\ndtype: float32\nshard_bytes: 9kB\n"
    )
    (tmp_path / "elsewhere").mkdir()
    done = cli("soup", "--recipe", "../recipe.yaml", "-o", "soup", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    cli("soup", "run1:2", "run2", "--dtype", "float32", "--shard-size", "9kB", "-o", "again")
    assert weights_bytes(tmp_path / "elsewhere" / "soup") == weights_bytes(tmp_path / "again")


def test_the_recipe_that_a_soup_wrote_makes_it_again(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    cli("soup", "run1:0.1", "run2:0.2", "-o", "soup", "--buffers", "first", "--nonfinite", "warn")
    done = cli("soup", "--recipe", "soup/recipe.yaml", "-o", "again")
    assert done.returncode == 0, done.stderr
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "again")


@pytest.mark.parametrize("arguments", [["run*"], [f"run{i}" for i in (1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)]])
def test_what_a_shell_expands_is_taken_in_natural_order_and_the_order_is_printed(cli, tmp_path, arguments):
    fine_tunes(tmp_path, 11)
    done = cli("soup", *arguments, "--dry-run")
    rows = [line.split()[1] for line in done.stdout.splitlines() if "weight 1," in line]
    assert rows == [f"run{i + 1}" for i in range(11)]


def test_an_order_of_ones_own_and_as_given_are_kept(cli, tmp_path):
    fine_tunes(tmp_path, 11)
    for arguments, want in (
        (["run2", "run1", "run10"], ["run2", "run1", "run10"]),
        (["run1", "run10", "run2", "--as-given"], ["run1", "run10", "run2"]),
        (["run9", "run1*", "--as-given"], ["run9", "run1", "run10", "run11"]),
    ):
        plan = json.loads(cli("soup", *arguments, "--dry-run", "--json").stdout)
        assert [i["path"] for i in plan["ingredients"]] == want


def test_a_soup_does_not_wait_for_scipy(tmp_path):
    """numba imports it where it is installed, and nothing here uses it."""
    runs = fine_tunes(tmp_path, 2)
    code = (
        "import sys; from streamsoup.cli import build_parser; "
        "args = build_parser().parse_args(sys.argv[1:]); code = args.run(args); "
        "found = [m for m in sys.modules if m.split('.')[0] in ('scipy', 'torch', 'zarr') and sys.modules[m]]; "
        "print(code, found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "soup", *runs, "-o", str(tmp_path / "soup"), "--quiet"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "0 []\n", done.stderr


def test_dry_run_prints_the_plan_and_leaves_nothing(cli, tmp_path):
    fine_tunes(tmp_path, 3)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    done = cli("soup", "run1", "run2", "run3", "-o", "deep/soup", "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("tensors", "parameters", "read", "write", "disk needed", "tile", "peak memory", "run2"):
        assert word in done.stdout
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_dry_run_as_json_tells_what_a_run_then_does(cli, tmp_path):
    fine_tunes(tmp_path, 3)
    plan = json.loads(cli("soup", "run1", "run2", "run3", "-o", "soup", "--dry-run", "--json").stdout)
    result = json.loads(cli("soup", "run1", "run2", "run3", "-o", "soup", "--json").stdout)
    assert plan["bytes_to_read"] == result["bytes_read"]
    assert plan["bytes_to_write"] == sum(p.stat().st_size for p in (tmp_path / "soup").glob("*.safetensors"))
    assert plan["projected_peak_bytes"] == result["projected_peak_bytes"] <= plan["budget_bytes"]
    assert (plan["tensors"], plan["parameters"]) == (result["tensors"], result["parameters"])
    assert result["measured_peak_bytes"] <= result["projected_peak_bytes"]


def test_dry_run_refuses_what_a_run_would_refuse(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    (tmp_path / "soup").mkdir()
    assert_one_sentence(cli("soup", "run1", "run2", "-o", "soup", "--dry-run"), "exists already")
    assert_one_sentence(cli("soup", "run1", "run2", "--budget", "1kB", "--dry-run"), "the least that would do")


def test_json_is_one_document_and_nothing_else(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    done = cli("soup", "run1", "run2", "-o", "soup", "--json")
    document = json.loads(done.stdout)
    assert document["path"] == str(tmp_path / "soup")
    assert {"bytes_read", "bytes_written", "seconds", "gb_per_s", "measured_peak_bytes", "limited_by"} < document.keys()
    assert done.stderr == ""


def test_quiet_prints_nothing(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    done = cli("soup", "run1", "run2", "-o", "soup", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_piped_output_has_no_control_characters(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    done = cli("soup", "run1", "run2", "-o", "soup")
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_first_run_really_says_that_it_compiles(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    done = cli("soup", "run1", "run2", "-o", "soup", env={"NUMBA_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert "Compiling" in done.stderr


def test_a_run_that_must_compile_says_so(tmp_path, monkeypatch, capsys):
    import threading

    from streamsoup.backends.cpu import CpuBackend
    from streamsoup.cli.progress import LineProgress

    said = threading.Event()
    progress = LineProgress()
    monkeypatch.setattr("streamsoup.execution._COMPILE_NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(CpuBackend, "prepare", lambda *_, **__: said.wait(30))

    def compiling():
        progress.compiling()
        said.set()

    from streamsoup.cook import cook
    from streamsoup.recipe import make_recipe

    cook(make_recipe(fine_tunes(tmp_path, 2)), tmp_path / "soup", streamsoup.Execution(on_compile=compiling))
    assert "Compiling" in capsys.readouterr().err


def test_warn_prints_its_notes(cli, tmp_path):
    tensors = realistic(0, SHAPES)
    tensors["norm.scale"][1] = np.inf
    write_checkpoint(tmp_path / "run1", tensors)
    done = cli("soup", "run1", "-o", "soup", "--nonfinite", "warn")
    assert done.returncode == 0
    assert "norm.scale" in done.stdout
    assert "run1" in done.stdout
    assert "Traceback" not in done.stderr


def test_resume_goes_on_and_takes_no_other_ingredients(cli, tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr("streamsoup.workspace.Workspace.publish", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamsoup.soup(runs, tmp_path / "soup")
    ignored = (["--dtype", "float32"], ["--shard-size", "1MB"], ["--buffers", "first"], ["--coefficients"])
    for more in (["run1"], ["-o", "x"], ["--dry-run"], ["--recipe", "r.yaml"], ["--restart"], *ignored):
        assert_one_sentence(cli("soup", "--resume", "soup", *more), "--resume", code=2)
    done = cli("soup", "--resume", "soup")
    assert done.returncode == 0, done.stderr
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "soup"))
    assert not (tmp_path / "soup.partial").exists()


# -- errors ------------------------------------------------------------------------------------------------------


def test_no_arguments_print_help_and_exit_2(cli):
    done = cli()
    assert done.returncode == 2
    assert "usage" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["soup", "--nonsense"], ["soup", "a", "--threads", "many"], ["soup", "a", "--nonfinite", "perhaps"]],
)
def test_wrong_usage_exits_2(cli, arguments):
    done = cli(*arguments)
    assert done.returncode == 2
    assert "usage" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["soup", "nope", "-o", "soup"], ["nope", "no such file"]),
        (["soup", "run1", "other", "-o", "soup"], ["other", "run1"]),
        (["soup", "run1", "run2", "-o", "run1"], ["run1"]),
        (["soup", "run1", "run2", "-o", "run1/x"], ["lies inside"]),
        (["soup", "run1:1", "run2:-1", "-o", "soup"], ["cancel"]),
        (["soup", "run1:nan", "run2", "-o", "soup"], ["finite"]),
        (["soup", "run1:inf", "run2", "-o", "soup"], ["finite"]),
        (["soup", "run1", "-o", "soup", "--dtype", "int4"], ["int4"]),
        (["soup", "run1", "-o", "soup", "--budget", "lots"], ["lots"]),
        (["soup", "run1", "-o", "soup", "--budget", "9kB"], ["too small"]),
        (["soup", "run1", "-o", "soup", "--shard-size", "-1"], ["-1"]),
        (["soup", "run1", "-o", "soup", "--threads", "0"], ["thread"]),
        (["soup", "run1", "-o", "soup", "--device", "gpu"], ["gpu"]),
        (["soup", "--recipe", "missing.yaml", "-o", "soup"], ["missing.yaml"]),
        (["soup", "--recipe", "bad.yaml", "-o", "soup"], ["bad.yaml"]),
        (["soup", "--recipe", "run1/model.safetensors", "-o", "soup"], ["model.safetensors"]),
        (["soup", "--resume", "soup"], ["no unfinished work"]),
        (["soup", "empty", "-o", "soup"], ["empty", "no .safetensors"]),
        (["soup", "hostile", "-o", "soup"], ["hostile", "UTF-8"]),
        (["inspect", "nope"], ["nope"]),
        (["inspect", "hostile"], ["UTF-8"]),
        (["soup", "run1", "-o", "/proc/soup"], ["/proc"]),
    ],
)
def test_an_error_is_one_sentence_on_standard_error_and_leaves_nothing(cli, tmp_path, arguments, parts):
    fine_tunes(tmp_path, 2)
    write_checkpoint(tmp_path / "other", {"w": np.zeros(3, np.float32)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b'{"\xff"')
    (tmp_path / "bad.yaml").write_text("ingredients: [")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert_one_sentence(cli(*arguments), *parts)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["soup"], "Name the checkpoints"),
        (["soup", "run1"], "-o"),
        (["soup", "run1", "--recipe", "r.yaml", "-o", "soup"], "not both"),
        (["greedy"], "Name the checkpoints"),
        (["greedy", "run1", "run2", "-o", "soup"], "--score"),
        (["greedy", "run1", "run2", "--score", "true"], "-o"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(cli, tmp_path, arguments, part):
    assert_one_sentence(cli(*arguments), part, "--help", code=2)
    assert not list(tmp_path.iterdir())


def test_newlines_in_tensor_names_do_not_break_the_line(cli, tmp_path):
    write_checkpoint(tmp_path / "a", {"w\nTraceback\x1b[31m": np.zeros(3, np.float32)})
    write_checkpoint(tmp_path / "b", {"w\nTraceback\x1b[31m": np.zeros(4, np.float32)})
    done = cli("soup", "a", "b", "-o", "soup")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr


def test_debug_shows_a_traceback(cli, tmp_path):
    done = cli("soup", "nope", "-o", "soup", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_nonfinite_error_lists_all_and_offers_the_way_out(cli, tmp_path):
    for i in range(2):
        tensors = realistic(i, SHAPES)
        tensors["norm.scale"][i] = np.nan
        write_checkpoint(tmp_path / f"run{i}", tensors)
    done = cli("soup", "run0", "run1", "-o", "soup")
    assert done.returncode == 1
    assert "run0" in done.stderr
    assert "run1" in done.stderr
    assert "--nonfinite" in done.stderr
    assert "soup.partial" in done.stderr
    assert not (tmp_path / "soup").exists()
    done = cli("soup", "--resume", "soup", "--nonfinite", "allow")
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path):
    fine_tunes(tmp_path, 2)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "streamsoup", "inspect", "run1", "--tensors"],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# -- inspect -----------------------------------------------------------------------------------------------------


def test_inspect_tells_what_is_in_a_checkpoint(cli, tmp_path):
    write_checkpoint(tmp_path / "a", {**realistic(0, SHAPES), "n": np.arange(3)}, shards=2)
    done = cli("inspect", "a")
    assert done.returncode == 0
    for part in ("5 tensors", "4 BF16", "1 I64", "2 file(s)", "5,448 parameters"):
        assert part in done.stdout
    listed = cli("inspect", "a", "--tensors").stdout
    for name in SHAPES:
        assert name in listed


def test_inspect_says_whether_checkpoints_fit(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    done = cli("inspect", "run1", "run2")
    assert done.returncode == 0
    assert "fit together" in done.stdout
    tensors = realistic(3, SHAPES)
    tensors["layer.0.bias"] = np.zeros(71, np.float32)
    del tensors["norm.scale"]
    write_checkpoint(tmp_path / "odd", tensors)
    done = cli("inspect", "run1", "run2", "odd")
    assert done.returncode == 1
    assert "do not fit" in done.stdout
    assert "layer.0.bias: shape (71,)" in done.stdout
    assert "norm.scale" in done.stdout


def test_inspect_as_json(cli, tmp_path):
    fine_tunes(tmp_path, 2)
    document = json.loads(cli("inspect", "run1", "run2", "--json", "--tensors").stdout)
    assert document["problems"] == []
    assert [c["path"] for c in document["checkpoints"]] == ["run1", "run2"]
    assert {t["name"] for t in document["checkpoints"][0]["tensor_list"]} == set(SHAPES)


# -- parsing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("runs/a", ("runs/a", None)),
        ("runs/a:0.7", ("runs/a", 0.7)),
        ("runs/a:-1", ("runs/a", -1.0)),
        ("runs/a:1e-3", ("runs/a", 1e-3)),
        ("a:b", ("a:b", None)),
        ("a:b:2", ("a:b", 2.0)),
        (":2", (":2", None)),
        ("a:", ("a:", None)),
        ("C:\\x:3", ("C:\\x", 3.0)),
    ],
)
def test_weights_are_taken_off_the_end_of_a_path(tmp_path, monkeypatch, text, want):
    monkeypatch.chdir(tmp_path)
    assert _split_weight(text) == want


def test_a_path_that_exists_keeps_its_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step:100").mkdir()
    assert _split_weight("step:100") == ("step:100", None)
    assert _split_weight("step:100:2") == ("step:100", 2.0)


def test_sizes_on_the_command_line_are_sizes():
    assert parse_bytes("512MiB") == 512 * 2**20
