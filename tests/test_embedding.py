"""streamsoup as a guest in another program: quiet, from any thread, and as docs/embedding.md says and prints it."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from factory import fine_tunes, read_checkpoint, same_bits, weights_bytes, write_checkpoint

import streamsoup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples" / "embedding").glob("*.py"))


# -- a quiet guest ---------------------------------------------------------------------------------------------------


def test_a_process_is_left_as_it_was_and_nothing_is_printed(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 3)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "host_process_driver.py"), str(tmp_path), *runs],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, "changed by the library"
    assert not done.stderr


GLOBAL = re.compile(
    r"signal\.(signal|alarm|setitimer|pthread_sigmask)\b|logging\.(basicConfig|disable)\b|os\.(putenv|chdir|umask)\b"
    r"|os\.environ(\[.*\] = |\.(update|setdefault|pop))|torch\.set_|np\.seterr\b|warnings\.(simple)?filter"
)


def test_signals_are_the_command_lines_alone():
    """A library that sets handlers takes them from its host; and `os.environ` is everybody's."""
    found = []
    for path in sorted((ROOT / "streamsoup").rglob("*.py")):
        where = path.relative_to(ROOT / "streamsoup").as_posix()
        if where.startswith("cli/") or path.parts[-2] == "kernels":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Assign | ast.Delete) else ""
            if GLOBAL.match(text):
                found.append(f"{where}: {text}")
    assert not found


def test_two_threads_make_the_soups_that_one_makes(tmp_path):
    pools = [fine_tunes(tmp_path / name, 3, dtype=dtype) for name, dtype in (("a", "BF16"), ("b", "F32"), ("c", "F64"))]
    makings = [
        ("linear", lambda out, runs: streamsoup.soup(runs, out, budget_bytes=1 << 26)),
        ("ties", lambda out, runs: streamsoup.soup(runs[1:], out, method="ties", base=runs[0], budget_bytes=1 << 26)),
        ("sum", lambda out, runs: _sum(runs).mean().save(out)),
        ("view", lambda out, runs: streamsoup.open(runs, budget_bytes=1 << 26).save(out)),
    ]
    jobs = [(kind, make, number) for kind, make in makings for number in range(len(pools))]
    for kind, make, number in jobs:
        make(tmp_path / f"alone-{kind}-{number}", pools[number])
    failures = []

    def work(mine):
        try:
            for kind, make, number in mine:
                make(tmp_path / f"beside-{kind}-{number}", pools[number])
        except BaseException as error:  # told by the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=work, args=(jobs[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for kind, _, number in jobs:
        alone, beside = (weights_bytes(tmp_path / f"{way}-{kind}-{number}") for way in ("alone", "beside"))
        assert alone == beside, (kind, number)


def _sum(runs):
    running = streamsoup.RunningSoup(runs, budget_bytes=1 << 26)
    for run in runs:
        running.add(run)
    return running


class CancelledError(Exception):
    """What a host raises to cancel."""


@pytest.mark.parametrize("kind", [CancelledError, KeyboardInterrupt])
def test_a_soup_that_its_host_cancelled_can_be_gone_on_with(tmp_path, monkeypatch, kind):
    rng = np.random.default_rng(0)
    tensors = [{f"w{i}": rng.standard_normal(20_000).astype(np.float32) for i in range(30)} for _ in range(2)]
    runs = [str(write_checkpoint(tmp_path / f"run{i}", found)) for i, found in enumerate(tensors)]
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(2048, 1)])
    monkeypatch.setattr("streamsoup.engine._PROGRESS_SECONDS", 0.001)

    def cancel(progress):
        if progress.done_bytes > progress.total_bytes // 4:
            raise kind

    before = threading.active_count()
    with pytest.raises(kind):
        streamsoup.soup(runs, tmp_path / "soup", progress=cancel)
    assert threading.active_count() == before
    assert not (tmp_path / "soup").exists()
    result = streamsoup.resume(tmp_path / "soup")
    assert result.bytes_read < sum(a.nbytes for found in tensors for a in found.values()), "nothing had been kept"
    streamsoup.soup(runs, tmp_path / "reference")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "reference"))


def test_a_view_and_a_sum_that_were_cancelled_are_what_they_were(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 3)

    def cancel(progress):
        raise CancelledError

    view = streamsoup.open(runs, progress=cancel)
    with pytest.raises(CancelledError):
        view["embed.weight"]
    plain = streamsoup.open(runs)["embed.weight"]
    view._execution = streamsoup.Execution()
    assert (view["embed.weight"] == plain).all()
    with pytest.raises(CancelledError):
        streamsoup.open(runs, progress=cancel).save(tmp_path / "soup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


# -- the page and its examples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_and_are_on_the_page(path, tmp_path):
    assert f"examples/embedding/{path.name}" in PAGE
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not [left for left in tmp_path.iterdir() if not left.name.startswith("torchinductor")]


def test_every_name_on_the_page_exists():
    for module, name in re.findall(r"^from (streamsoup[\w.]*) import (\w+)", PAGE, re.MULTILINE):
        if "hosts." in module:
            assert (ROOT / f"{module.replace('.', '/')}.py").read_text().count(f"{name}(") >= 1
            continue
        assert hasattr(__import__(module, fromlist=[name]), name) or __import__(f"{module}.{name}")
    for name in re.findall(r"\bstreamsoup\.(\w+)\(", PAGE):
        assert name in streamsoup._HOMES


# -- lm-evaluation-harness -------------------------------------------------------------------------------------------


def lm_eval_command():
    """The command of the page, as printed."""
    (block,) = [block for block in PAGE.split("```")[1::2] if "lm_eval" in block]
    return block.replace("\\\n", " ").strip()


def run_printed(command, folder, environment, **changes):
    for old, new in changes.items():
        assert old in command
        command = command.replace(old, new)
    words = shlex.split(command)
    assert words[0] == "streamsoup"
    runs = sorted(str(path.relative_to(folder)) for path in (folder / "runs").iterdir())
    words[words.index("runs/*") : words.index("runs/*") + 1] = runs
    return subprocess.run(
        [sys.executable, "-m", "streamsoup", *words[1:]], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


STAND_IN = """#!{python}
import json, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert arguments["--model"] == "hf", arguments
model = arguments["--model_args"].removeprefix("pretrained=")
assert pathlib.Path(model, "model.safetensors").exists(), model
folder = pathlib.Path(arguments["--output_path"], model.replace("/", "__"))
folder.mkdir(parents=True)
value = {{"run1": 0.25, "run2": 0.5}}.get(pathlib.Path(model).name, 0.375)
task = arguments["--tasks"]
document = {{"results": {{task: {{"alias": task, "acc,none": value, "acc_stderr,none": "N/A"}}}}}}
(folder / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps(document))
print("| arc_easy | as a table |")
"""


def test_the_harness_is_asked_as_printed(tmp_path):
    fine_tunes(tmp_path / "runs", 2)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "lm_eval"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = run_printed(lm_eval_command(), tmp_path, {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    decisions = json.loads((tmp_path / "soup" / "decisions.json").read_text())
    assert sorted(decisions["own_scores"].values()) == [0.25, 0.5]
    assert [trial["score"] for trial in decisions["trials"]] == [0.5, 0.375]
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "runs" / "run2"))
