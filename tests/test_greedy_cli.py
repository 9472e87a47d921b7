"""`streamsoup greedy`: what it says, what it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from factory import read_checkpoint, same_bits, write_checkpoint, write_sparse

import streamsoup
from streamsoup.cli import build_parser, main
from streamsoup.cli.guard import run_command
from streamsoup.picture import draw_greedy

# An evaluator that starts in a few milliseconds: it knows nothing of numpy.
EVALUATOR = """
import json, os, struct, sys
folder, log = sys.argv[1:3]
raw = open(os.path.join(folder, "model.safetensors"), "rb").read()
begin = 8 + int.from_bytes(raw[:8], "little")
header = json.loads(raw[8:begin])
a, b = header["w"]["data_offsets"]
values = struct.unpack("<%df" % ((b - a) // 4), raw[begin + a : begin + b])
with open(log, "a") as file:
    file.write(folder + "\\n")
fail = os.environ.get("FAIL_AT")
if fail and len(open(log).readlines()) == int(fail):
    print("CUDA out of memory")
    sys.exit(3)
if os.environ.get("SLEEP_AT") and len(open(log).readlines()) == int(os.environ["SLEEP_AT"]):
    import time
    open(log + ".sleeps", "w").write("")
    time.sleep(100)
loss = sum(abs(v) for v in values)
print(json.dumps({"eval": {"score": -loss, "loss": loss}}) if "json" in sys.argv else -loss)
"""


def make_runs(folder, count=4, bad=(2,)):
    """The target is zero; good runs are around it, bad ones far off."""
    rng = np.random.default_rng(7)
    runs = []
    for i in range(count):
        noise = rng.integers(-64, 65, 200) + 4 * i + (500 if i in bad else 0)
        tensors = {"w": (noise / 64).astype(np.float32), "ids": np.arange(3)}
        runs.append(str(write_checkpoint(folder / f"run{i}", tensors, companions={"config.json": "{}"})))
    return runs


class Kitchen:
    """Runs, an evaluator with a log, and the command line: in this process, or in one of its own."""

    def __init__(self, folder, capfd):
        self.folder, self.capfd, self.log = folder, capfd, folder / "log"
        self.runs = make_runs(folder / "runs")
        (folder / "score.py").write_text(EVALUATOR)
        self.score = f"{sys.executable} -I -S {folder / 'score.py'} {{soup}} {self.log}"

    def arguments(self, *more, runs=None):
        runs = self.runs if runs is None else runs
        return ["greedy", *runs, "--score", self.score, "-o", str(self.folder / "soup"), *map(str, more)]

    def __call__(self, *arguments):
        """Run in this process; returns the exit code, what was printed, and the errors."""
        self.capfd.readouterr()
        args = build_parser().parse_args([str(a) for a in arguments])
        args.guarded = False  # without the fork around it
        code = run_command(args)
        said = self.capfd.readouterr()
        return code, said.out, said.err

    def asked(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def names(self):
        return {p.name for p in self.folder.iterdir()} - {"runs", "score.py", "log", "log.sleeps"}


@pytest.fixture
def kitchen(tmp_path, capfd):
    return Kitchen(tmp_path, capfd)


def test_the_table_has_a_line_for_each_decision(kitchen):
    code, out, err = kitchen(*kitchen.arguments())
    assert code == 0, err
    heading, *rows = out.strip().splitlines()
    assert [word for word in ("ingredient", "own score", "soup", "kept", "seconds", "read") if word in heading] == [
        "ingredient", "own score", "soup", "kept", "seconds", "read",
    ]  # fmt: skip
    assert [re.split(r"\s{2,}", row)[0] for row in rows[:4]] == [f"runs/run{i}" for i in (0, 1, 3, 2)]
    for row, word in zip(rows[:4], ["kept", "kept", "kept", "rejected"], strict=True):
        assert f" {word} " in row
        assert re.search(r"-\d", row)
        assert re.search(r"\d+\.\d\d +[\d.,]+ \w+$", row), "no seconds and bytes"
    assert "kept 3 of 4: runs/run0, runs/run1, runs/run3" in out
    assert "7 evaluations" in out
    assert f"soup: {kitchen.folder / 'soup'}" in out
    assert err.count("alone:") == 4
    assert kitchen.names() == {"soup"}, "no work folder is left"
    assert len(kitchen.asked()) == 7


def test_json_is_all_that_is_printed(kitchen):
    code, out, err = kitchen(*kitchen.arguments("--json"))
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert [Path(m["path"]).name for m in document["members"]] == ["run0", "run1", "run3"]
    told = "score own_scores ties trials evaluations reads bytes_read bytes_written peak_bytes rebuilt seconds path"
    assert set(told.split()) <= document.keys()
    assert [t["accepted"] for t in document["trials"]] == [True, True, True, False]
    soup = json.loads((kitchen.folder / "soup" / "decisions.json").read_text())
    assert [t["path"] for t in soup["trials"]] == [t["path"] for t in document["trials"]]


def test_quiet_prints_nothing(kitchen):
    assert kitchen(*kitchen.arguments("--quiet")) == (0, "", "")
    assert (kitchen.folder / "soup").exists()


def test_ingredients_too_far_apart_are_told_plainly(kitchen):
    runs = make_runs(kitchen.folder / "apart", bad=(1, 2, 3))
    code, out, err = kitchen(*kitchen.arguments(runs=runs))
    assert code == 0, err
    assert out.count(" rejected ") == 3
    assert "kept 1 of 4" in out
    assert "No candidate was good enough" in out
    assert "best single ingredient" in out
    assert "far apart" in out
    assert same_bits(read_checkpoint(kitchen.folder / "soup"), read_checkpoint(Path(runs[0])))


def test_a_single_ingredient_is_called_the_best_only_where_it_is(kitchen):
    """Of a given order the first may be anything, and with --max-ingredients 1 nothing else is tried."""
    runs = make_runs(kitchen.folder / "apart", 2, bad=(1,))
    # Lower counts as better, so run1, whose sum is large, is the worse one, and no soup with it helps run0.
    code, out, _ = kitchen(*kitchen.arguments("--order", "given", "--minimize", runs=runs[::-1]))
    assert code == 0
    if "kept 1 of 2: apart/run1" in out:
        assert "best single ingredient" not in out, "run1 was only the first; nobody scored run0"
    _, out, _ = kitchen(*kitchen.arguments("--max-ingredients", "1", "--overwrite"))
    assert "No candidate was good enough" not in out, "none was tried"


def test_what_was_not_tried_counts_too(kitchen):
    _, out, _ = kitchen(*kitchen.arguments("--max-ingredients", "2"))
    assert "kept 2 of 4" in out


def test_pruning_has_words_of_its_own(kitchen):
    code, out, err = kitchen(*kitchen.arguments("--prune"))
    assert code == 0, err
    assert " dropped " in out
    assert " needed " in out
    assert re.search(r"kept [123] of 4", out)


def test_repeated_rounds_show_weights(kitchen):
    code, out, err = kitchen(*kitchen.arguments("--rounds", "3", "--tolerance", "1e9", "--max-ingredients", "2"))
    assert code == 0, err
    assert re.search(r"run0 x[23]", out)
    recipe = streamsoup.read_recipe(kitchen.folder / "soup" / "recipe.yaml")
    assert max(i.weight for i in recipe.ingredients) >= 2


def test_ties_are_shown(kitchen):
    (kitchen.folder / "own.csv").write_text("".join(f"run{i},0.5\n" for i in range(4)))
    code, out, err = kitchen(*kitchen.arguments("--order", kitchen.folder / "own.csv"))
    assert code == 0, err
    assert "equal scores of their own" in out
    assert len(kitchen.asked()) == 3, "scores that are given are not asked for"


def test_a_metric_of_json_decides_and_others_are_kept(kitchen):
    kitchen.score += " json"
    code, out, _ = kitchen(*kitchen.arguments("--metric", "eval.loss", "--minimize", "--also", "eval.score", "--json"))
    assert code == 0
    trials = json.loads(out)["trials"]
    assert all(t["also"]["eval.score"] == -t["score"] for t in trials[1:])
    assert [t["accepted"] for t in trials] == [True, True, True, False]


def test_a_dry_run_forecasts_and_does_nothing(kitchen):
    code, out, err = kitchen(*kitchen.arguments("--dry-run"))
    assert (code, err) == (0, "")
    for words in ("greedy soup of 4 checkpoints", "running sum", "a trial", "an accepted", "disk needed", "budget"):
        assert words in out
    assert kitchen.names() == set()
    assert kitchen.asked() == []
    code, out, _ = kitchen(*kitchen.arguments("--dry-run", "--json"))
    document = json.loads(out)
    assert document["disk_bytes"] == document["candidate_bytes"] + document["output_bytes"] + document["sums_bytes"]
    assert document["sum_bytes"] == 200 * 8
    assert document["sum_on_disk"] is False


def test_for_fifty_large_checkpoints_the_dry_run_says_what_that_means(kitchen):
    """50 x 14 GB, of which nothing is on the disk but headers."""
    runs = [
        write_sparse(kitchen.folder / "large" / f"run{i:02d}" / "model.safetensors", {"w": ("BF16", (70_000, 100_000))})
        for i in range(50)
    ]
    runs = [str(run.parent) for run in runs]
    code, out, err = kitchen(*kitchen.arguments("--dry-run", "--budget", "2GiB", runs=runs))
    assert code == 0, err
    assert "50 checkpoints of up to 14 GB" in out
    assert re.search(r"running sum +56 GB .*2 generations", out)
    assert re.search(r"a trial +reads 70 GB .*writes 14 GB", out)
    assert re.search(r"disk needed +140 GB: sums 112 GB, one candidate 14 GB, the soup 14 GB", out)
    assert "--sums-dtype float32 saves 56 GB" in out
    code, out, err = kitchen(*kitchen.arguments("--dry-run", "--budget", "2GiB", "--sums-dtype", "float32", runs=runs))
    assert re.search(r"disk needed +84 GB", out)
    assert "--sums-dtype float32 saves" not in out
    code, out, err = kitchen(*kitchen.arguments(runs=runs))
    assert code == 1
    assert "are needed" in err or "free" in err
    assert kitchen.asked() == []


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_run_is_drawn(kitchen, suffix):
    picture = kitchen.folder / f"run.{suffix}"
    code, _, err = kitchen(*kitchen.arguments("--plot", picture))
    assert code == 0, err
    raw = picture.read_bytes()
    assert raw.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in raw


@pytest.mark.parametrize("options", [{}, {"order": "given"}, {"max_ingredients": 2}, {"prune": True}, {"restarts": 2}])
def test_the_picture_says_how_many_were_kept_of_all(kitchen, monkeypatch, options):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))

    def score(candidate):
        return -float(np.abs(candidate.tensors()["w"].double().numpy()).sum())

    result = streamsoup.greedy(kitchen.runs, score=score, budget_bytes="200MiB", **options)
    draw_greedy(result, "nowhere.png", metric="minus distance")
    (axes,) = drawn[0].axes
    assert f"{len(result.members)} of 4 " in axes.get_title()
    assert axes.get_ylabel() == "minus distance"
    line = axes.lines[0].get_ydata()
    assert line[-1] == [t.score for t in result.trials if t.run == 0 and t.accepted][-1]
    assert len(line) == sum(t.run == 0 for t in result.trials)


@pytest.mark.parametrize("name", ["nowhere/run.png", "run.docx", "run"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_scored(kitchen, name):
    code, _, err = kitchen(*kitchen.arguments("--plot", kitchen.folder / name))
    assert code in (1, 2)
    assert name in err
    assert "Internal error" not in err
    assert kitchen.asked() == []


def test_a_picture_that_fails_after_all_leaves_the_soup_and_no_work(kitchen, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device", "run.png")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fails)
    code, _, err = kitchen(*kitchen.arguments("--plot", kitchen.folder / "run.png"))
    assert code == 1
    assert "run.png" in err
    assert kitchen.names() - {"run.png"} == {"soup"}


def test_candidates_go_where_they_are_sent_and_do_not_stay(kitchen):
    (kitchen.folder / "ram").mkdir()
    code, _, err = kitchen(*kitchen.arguments("--candidates", kitchen.folder / "ram", "--sums", "disk"))
    assert code == 0, err
    assert any(asked.startswith(str(kitchen.folder / "ram" / "candidate-")) for asked in kitchen.asked())
    assert kitchen.names() == {"soup", "ram"}
    assert list((kitchen.folder / "ram").iterdir()) == []


def test_a_work_folder_of_ones_own_keeps_scores_and_decisions(kitchen):
    code, _, _ = kitchen(*kitchen.arguments("--workdir", kitchen.folder / "work"))
    assert code == 0
    assert {"greedy.json", "scores.jsonl", "decisions.json"} <= {p.name for p in (kitchen.folder / "work").iterdir()}
    (kitchen.folder / "mine").mkdir()
    (kitchen.folder / "mine" / "notes.txt").write_text("keep me")
    code, _, err = kitchen(*kitchen.arguments("--overwrite", "--workdir", kitchen.folder / "mine"))
    assert code == 0, err
    assert (kitchen.folder / "mine" / "notes.txt").read_text() == "keep me"


# -- how it ends ---------------------------------------------------------------------------------------------------


def test_an_evaluator_that_fails_is_quoted_and_resuming_goes_on(kitchen, monkeypatch):
    monkeypatch.setenv("FAIL_AT", "6")
    code, out, err = kitchen(*kitchen.arguments())
    assert code == 1
    assert " kept " in out, "what was decided before is shown"
    lines = [line for line in err.splitlines() if "alone:" not in line]
    assert "failed with exit code 3" in lines[0]
    assert "streamsoup: | CUDA out of memory" in lines
    assert f"--resume {kitchen.folder / 'soup.work'}" in lines[-1]
    assert all(line.startswith("streamsoup: ") for line in lines)
    assert kitchen.names() == {"soup.work"}
    monkeypatch.delenv("FAIL_AT")
    code, out, err = kitchen("greedy", "--resume", kitchen.folder / "soup.work")
    assert code == 0, err
    assert "kept 3 of 4" in out
    assert "2 evaluations" in out
    assert len(kitchen.asked()) == 6 + 2
    assert (kitchen.folder / "soup").exists()


def test_an_evaluation_that_takes_too_long_stops_the_run(kitchen, monkeypatch):
    monkeypatch.setenv("SLEEP_AT", "5")
    code, _, err = kitchen(*kitchen.arguments("--score-timeout", "1"))
    assert code == 1
    assert "longer than 1 s" in err
    assert "--score-timeout" in err
    assert "--resume" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_where_it_is_kept(kitchen, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "streamsoup", *kitchen.arguments()],
        env={**os.environ, "SLEEP_AT": "6"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        deadline = time.monotonic() + 100
        while not (kitchen.folder / "log.sleeps").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "Traceback" not in err
    assert ("Interrupted." if number == signal.SIGINT else "Terminated.") in err
    assert f"--resume {kitchen.folder / 'soup.work'}" in err
    code, out, err = kitchen("greedy", "--resume", kitchen.folder / "soup.work", "--json")
    assert code == 0, err
    assert json.loads(out)["evaluations"] == 2
    assert len(kitchen.asked()) == 8


def test_a_run_that_was_killed_says_how_to_go_on(kitchen):
    args = build_parser().parse_args(kitchen.arguments("--workdir", kitchen.folder / "work"))
    (kitchen.folder / "work").mkdir()
    args.on_death(args)
    assert kitchen.capfd.readouterr().err == ""
    (kitchen.folder / "work" / "greedy.json").write_text("{}")
    args.on_death(args)
    assert f"--resume {kitchen.folder / 'work'}" in kitchen.capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k: ["greedy"], "Name the checkpoints"),
        (lambda k: ["greedy", *k.runs, "-o", "soup"], "--score"),
        (lambda k: ["greedy", *k.runs, "--score", "x"], "-o"),
    ],
)
def test_wrong_usage_is_one_sentence_and_2(kitchen, change, words):
    code, out, err = kitchen(*change(kitchen))
    assert (code, out) == (2, "")
    assert words in err
    assert "greedy --help" in err
    assert len(err.strip().splitlines()) == 1
    assert kitchen.names() == set()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--order", "nowhere.json"], "nowhere.json"),
        (["--order", "alphabetical"], "alphabetical"),
        (["--tolerance", "-1"], "tolerance"),
        (["--rounds", "0"], "rounds"),
        (["--max-ingredients", "0"], "max"),
        (["--budget", "1KiB"], "budget"),
        (["--dtype", "int8"], "int8"),
        (["--workdir", "/proc/nowhere"], "/proc/nowhere"),
        (["--threads", "0"], "threads"),
        (["--score-timeout", "-1"], "timeout"),
        (["--score-timeout", "0"], "timeout"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_is_scored(kitchen, more, words):
    code, out, err = kitchen(*kitchen.arguments(*more))
    assert code in (1, 2)
    assert out == ""
    assert words.lower() in err.lower()
    assert "took longer" not in err
    assert "Internal error" not in err
    assert len([line for line in err.strip().splitlines() if "--resume" not in line]) == 1
    assert kitchen.asked() == []


@pytest.mark.parametrize("which", ["one", "twice", "nowhere", "other shape", "taken", "inside"])
def test_ingredients_and_places_that_do_not_do_are_refused_before_anything_is_scored(kitchen, which):
    runs, more = list(kitchen.runs), []
    if which == "one":
        runs = runs[:1]
    elif which == "twice":
        runs.append(runs[0])
    elif which == "nowhere":
        runs.append(str(kitchen.folder / "runs" / "run9"))
    elif which == "other shape":
        runs.append(str(write_checkpoint(kitchen.folder / "runs" / "run9", {"w": np.zeros(3, np.float32)})))
    elif which == "taken":
        (kitchen.folder / "soup").mkdir()
        (kitchen.folder / "soup" / "thesis.txt").write_text("")
        more = ["--overwrite"]
    else:
        more = ["-o", runs[0] + "/soup"]
    code, out, err = kitchen(*kitchen.arguments(*more, runs=runs))
    assert (code, out) == (1, "")
    assert "Internal error" not in err
    assert kitchen.asked() == []
    assert kitchen.names() <= {"soup"}, "a run that was refused leaves no work folder"


def test_resuming_takes_everything_from_the_work_folder(kitchen, monkeypatch):
    """Options that would be ignored are refused: a person thinks that they count."""
    monkeypatch.setenv("FAIL_AT", "6")
    assert kitchen(*kitchen.arguments("--workdir", kitchen.folder / "work"))[0] == 1
    monkeypatch.delenv("FAIL_AT")
    before = kitchen.asked()
    for more in (["--accept", "gt"], ["--score", "other"], kitchen.runs, ["-o", "elsewhere"], ["--prune"]):
        code, out, err = kitchen("greedy", "--resume", kitchen.folder / "work", *more)
        assert (code, out) == (2, ""), f"{more} was ignored in silence"
        assert "--resume" in err
    assert kitchen.asked() == before


@pytest.mark.parametrize("full", ["work", "ram", "elsewhere"])
def test_every_disk_that_will_be_written_to_must_have_room(kitchen, monkeypatch, full):
    for name in ("work", "ram", "elsewhere"):
        (kitchen.folder / name).mkdir()
    real, stat = os.statvfs, Path.stat
    none = lambda path: os.statvfs_result([*real(path)[:4], 0, *real(path)[5:]])  # noqa: E731
    monkeypatch.setattr(os, "statvfs", lambda path: none(path) if Path(path).name == full else real(path))
    # As if each lay on a file system of its own.
    monkeypatch.setattr(Path, "stat", lambda self, **k: OwnDisk(stat(self, **k), self))
    arguments = kitchen.arguments("--workdir", kitchen.folder / "work", "--candidates", kitchen.folder / "ram")
    arguments[arguments.index("-o") + 1] = kitchen.folder / "elsewhere" / "soup"
    code, out, err = kitchen(*arguments, "--sums", "disk")
    assert (code, out) == (1, "")
    assert f"{kitchen.folder / full}: " in err
    assert "are needed, 0 B are free" in err
    assert kitchen.asked() == []


class OwnDisk:
    """A stat result with a device number of the folder's own."""

    def __init__(self, found, path):
        self._found = found
        self.st_dev = hash(str(path))

    def __getattr__(self, name):
        return getattr(self._found, name)


def test_the_given_order_is_the_one_that_was_given(kitchen):
    runs = kitchen.runs
    first = [*runs[1:], runs[0]] if runs == sorted(runs) else runs
    arguments = kitchen.arguments("--order", "given", "--json", runs=sorted(first))
    code, out, err = kitchen(*arguments)
    assert code == 0, err
    assert [t["path"] for t in json.loads(out)["trials"]] == sorted(first)


def test_what_decides_nothing_may_differ_when_a_run_goes_on(kitchen, monkeypatch):
    monkeypatch.setenv("SLEEP_AT", "6")
    assert kitchen(*kitchen.arguments("--score-timeout", "1"))[0] == 1
    monkeypatch.delenv("SLEEP_AT")
    (kitchen.folder / "ram").mkdir()
    more = ["--score-timeout", "60", "--threads", "1", "--budget", "150MiB", "--read", "plain", "--nonfinite", "warn"]
    more += ["--candidates", kitchen.folder / "ram"]
    code, out, err = kitchen("greedy", "--resume", kitchen.folder / "soup.work", *more)
    assert code == 0, err
    assert "kept 3 of 4" in out
    assert str(kitchen.folder / "ram") in kitchen.asked()[-1]
    assert kitchen.names() == {"soup", "ram"}, "the default work folder is removed at the end"


def test_there_must_be_something_to_resume(kitchen):
    code, _, err = kitchen("greedy", "--resume", kitchen.folder / "nowhere")
    assert code == 1
    assert "no greedy soup to resume" in err
    assert kitchen.names() == set()


def test_a_run_begun_elsewhere_can_be_resumed_from_anywhere(kitchen, monkeypatch):
    """Relative paths are those of the folder in which the run began."""
    monkeypatch.chdir(kitchen.folder)
    monkeypatch.setenv("FAIL_AT", "6")
    relative = ["runs/run0", "runs/run1", "runs/run2", "runs/run3"]
    assert kitchen("greedy", *relative, "--score", kitchen.score, "-o", "soup", "--workdir", "kept")[0] == 1
    monkeypatch.delenv("FAIL_AT")
    (kitchen.folder / "sub").mkdir()
    monkeypatch.chdir(kitchen.folder / "sub")
    code, _, err = kitchen("greedy", "--resume", "../kept")
    assert code == 0, err
    assert (kitchen.folder / "soup" / "model.safetensors").exists()


def test_help_names_every_option_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["greedy", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--score", "--metric", "--also", "--minimize", "--score-timeout", "--before-score", "--accept",
                   "--jobs", "--tolerance", "--order", "--seed", "--max-ingredients", "--prune", "--rounds",
                   "--restarts", "--workdir", "--candidates", "--sums-dtype", "--resume", "--plot", "--dry-run",
                   "--json", "--quiet", "{soup}", "{soup_file}", "{result}"):  # fmt: skip
        assert option in text


def test_the_whole_way_in_a_process_of_its_own(kitchen):
    done = subprocess.run(
        [sys.executable, "-m", "streamsoup", *kitchen.arguments("--sums", "disk", "--budget", "200MiB")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "kept 3 of 4" in done.stdout
    recipe = streamsoup.read_recipe(kitchen.folder / "soup" / "recipe.yaml")
    streamsoup.soup([i.path for i in recipe.ingredients], kitchen.folder / "again")
    assert same_bits(read_checkpoint(kitchen.folder / "soup"), read_checkpoint(kitchen.folder / "again"))
