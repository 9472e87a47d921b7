"""A score is the last line of a command, or a key of its JSON; all else is one sentence and a quotation."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamsoup.errors import ScoreError
from streamsoup.score import CommandScore, Place, Scores, read_scores


def command(tmp_path, body, arguments="{soup}"):
    script = tmp_path / "score.py"
    script.write_text(f"import sys, json\n{body}\n")
    return f"{sys.executable} {script} {arguments}"


def ask(tmp_path, body, *, arguments="{soup}", **options):
    return CommandScore(command(tmp_path, body, arguments), **options)(SimpleNamespace(path=tmp_path))


def test_the_last_line_is_the_score(tmp_path):
    assert ask(tmp_path, "print('epoch 1'); print(0.75); print()") == Scores(0.75)


def test_a_dotted_metric_is_looked_up_in_json_printed_last(tmp_path):
    body = "print('log {'); print(json.dumps({'results': {'acc,none': 0.5, 'a.b': {'c': 2}}, 'loss': 1}, indent=2))"
    found = ask(tmp_path, body, metric="results.acc,none", also=("loss", "results.a.b.c"))
    assert found == Scores(0.5, {"loss": 1.0, "results.a.b.c": 2.0})


def test_json_may_be_written_to_a_file(tmp_path):
    body = "json.dump({'acc': 0.25}, open(sys.argv[1], 'w')); print('done')"
    assert ask(tmp_path, body, arguments="{result}", metric="acc").value == 0.25


def test_the_soup_file_is_the_one_in_the_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert ask(tmp_path, "print(len(open(sys.argv[1], 'rb').read()))", arguments="{soup_file}").value == 5
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(ScoreError, match=r"2 \.safetensors files"):
        ask(tmp_path, "print(1)", arguments="{soup_file}")


def test_no_shell_reads_the_command(tmp_path):
    assert ask(tmp_path, "print(len(sys.argv[1:]))", arguments="'; echo 7' $HOME").value == 2


@pytest.mark.parametrize(
    ("body", "metric", "part"),
    [
        ("print('half a number'); sys.exit(3)", None, "exit code 3"),
        ("print('no number here')", None, "not a number"),
        ("pass", None, "not a number"),
        ("print('nan')", None, "decides nothing"),
        ("print('inf')", None, "decides nothing"),
        ("print('plain text')", "acc", "No JSON"),
        ("print(json.dumps({'loss': 1}))", "acc", "no metric"),
        ("print(json.dumps({'acc': 'high'}))", "acc", "not a number"),
        ("print(json.dumps({'acc': float('nan')}))", "acc", "decides nothing"),
        ("print(json.dumps({'acc': {'b': 1}}))", "acc", "not a number"),
        ("print(json.dumps([1, 2]))", "acc", "no metric"),
        ("print(json.dumps({'acc': 1})); print('bye')", "acc", "No JSON"),
    ],
)
def test_what_gives_no_score_is_an_error_that_quotes_the_output(tmp_path, body, metric, part):
    with pytest.raises(ScoreError, match=f"(?i){part}") as caught:
        ask(tmp_path, body, metric=metric)
    assert "\n" not in str(caught.value)
    if body != "pass":
        assert any("| " in note for note in getattr(caught.value, "__notes__", ())), "the output is not quoted"


def test_both_streams_of_a_failing_command_are_quoted_and_only_their_end(tmp_path):
    body = "[print('line', i) for i in range(100)]; print('sorry', file=sys.stderr); sys.exit(1)"
    with pytest.raises(ScoreError, match="exit code 1") as caught:
        ask(tmp_path, body)
    (note,) = caught.value.__notes__
    assert "| line 99" in note
    assert "| sorry" in note
    assert "| line 10\n" not in note


def test_a_command_ended_by_a_signal_has_failed(tmp_path):
    with pytest.raises(ScoreError, match="failed"):
        ask(tmp_path, "print(1, flush=True); import os; os.kill(os.getpid(), 9)")


def test_json_may_hold_lists_of_objects_and_log_lines_with_braces_before_it(tmp_path):
    body = "print('{not json'); print(json.dumps({'runs': [{'acc': 1}], 'acc': 0.5}, indent=1)); print()"
    assert ask(tmp_path, body, metric="acc").value == 0.5


def test_the_last_of_several_json_documents_counts(tmp_path):
    body = "print(json.dumps({'acc': 0.1}, indent=1)); print(json.dumps({'acc': 0.2}))"
    assert ask(tmp_path, body, metric="acc").value == 0.2


def test_others_may_be_recorded_beside_a_plain_number(tmp_path):
    assert ask(tmp_path, "print(json.dumps({'loss': 2, 'acc': 1}))", metric="acc", also=("loss",)).also == {"loss": 2.0}
    with pytest.raises(ScoreError, match="loss"):
        ask(tmp_path, "print(json.dumps({'acc': 1}))", metric="acc", also=("loss",))


def test_a_result_file_that_is_missing_or_no_json_is_an_error_that_quotes_the_output(tmp_path):
    for body in ("print('forgot it')", "open(sys.argv[1], 'w').write('{'); print('forgot it')"):
        with pytest.raises(ScoreError, match="JSON") as caught:
            ask(tmp_path, body, arguments="{result}", metric="acc")
        assert any("| forgot it" in note for note in caught.value.__notes__)


def test_a_result_file_of_an_earlier_evaluation_is_never_read_again(tmp_path):
    flag = tmp_path / "flag"
    body = (
        f"import os\nif not os.path.exists({str(flag)!r}):\n    open({str(flag)!r}, 'w')\n"
        "    open(sys.argv[1], 'w').write('{\"acc\": 1}')"
    )
    score = CommandScore(command(tmp_path, body, "{result}"), metric="acc")
    assert score(SimpleNamespace(path=tmp_path)).value == 1
    with pytest.raises(ScoreError):
        score(SimpleNamespace(path=tmp_path))


def test_shell_characters_do_nothing_and_spaces_in_paths_are_kept(tmp_path):
    folder = tmp_path / "a soup; touch nothing"
    folder.mkdir()
    script = command(tmp_path, "print(len(sys.argv[1:]) + (sys.argv[1] == sys.argv[2]) * 100)", "")
    score = CommandScore(f"{script} {{soup}} {{soup}} ; touch {tmp_path}/evil $(touch {tmp_path}/evil) `x` | > &&")
    assert score(SimpleNamespace(path=folder)).value > 100
    assert not (tmp_path / "evil").exists()


def test_an_evaluator_that_asks_a_question_gets_no_answer_and_does_not_hang(tmp_path):
    with pytest.raises(ScoreError, match="exit code 1") as caught:
        ask(tmp_path, "input('sure? ')", timeout_seconds=60.0)
    assert any("EOF" in note for note in caught.value.__notes__)


def test_output_that_is_no_text_is_taken_as_it_comes(tmp_path):
    assert ask(tmp_path, "sys.stdout.buffer.write(b'\\xff\\xfe\\n0.5\\n')").value == 0.5


def test_ctrl_c_ends_the_command_too(tmp_path):
    pid = tmp_path / "pid"
    body = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"

    def interrupt(number, frame):
        if pid.exists() and pid.read_text():  # it may take long to start
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path, body)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert pid.exists()
    assert not _lives(pid.read_text())


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path):
    pid, survived = tmp_path / "pid", tmp_path / "survived"
    child = f"import time; time.sleep(8); open({str(survived)!r}, 'w')"
    body = (
        "import subprocess, time\n"
        f"child = subprocess.Popen([sys.executable, '-I', '-S', '-c', {child!r}])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); print('began', flush=True); time.sleep(60)"
    )
    with pytest.raises(ScoreError, match="longer than 3 s") as caught:
        ask(tmp_path, body, timeout_seconds=3.0)
    assert any("began" in note for note in caught.value.__notes__)
    deadline = time.monotonic() + 10
    while _lives(pid.read_text()):
        assert time.monotonic() < deadline, "the child of a killed command goes on"
        time.sleep(0.02)
    assert not survived.exists()


def _lives(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_command_that_cannot_start_is_named():
    with pytest.raises(ScoreError, match="cannot be started"):
        CommandScore("no-such-program-anywhere {soup}")(SimpleNamespace(path=Path()))


def test_callables_may_return_numbers_or_mappings():
    assert read_scores(3, None, ()) == Scores(3.0)
    assert read_scores({"a": {"b": 2}, "c": 1}, "a.b", ("c",)) == Scores(2.0, {"c": 1.0})
    for wrong in ({"a": 1}, float("nan"), "high", None):
        with pytest.raises(ScoreError):
            read_scores(wrong, None, ())


def test_no_callable_can_smuggle_in_what_decides_nothing():
    for wrong in (Scores(float("nan")), Scores(float("inf")), {"a": float("inf")}):
        with pytest.raises(ScoreError):
            read_scores(wrong, "a", ())


def test_numbers_of_other_libraries_are_numbers():
    assert read_scores(np.float32(0.5), None, ()).value == 0.5
    assert read_scores(torch.tensor(0.25), None, ()).value == 0.25
    assert read_scores(np.array(1.5), None, ()).value == 1.5


def test_a_command_is_told_its_place(tmp_path):
    body = "import os; print(os.environ['STREAMSOUP_JOB'])"
    assert ask(tmp_path, body).value == 0
    assert CommandScore(command(tmp_path, body)).at(tmp_path, Place(3)).value == 3


@pytest.mark.parametrize("early", [True, False])
def test_a_command_that_is_ended_by_another_thread_takes_its_children_along(tmp_path, early):
    body = (
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(1000)'])\n"
        "open(sys.argv[1] + '/child', 'w').write(str(child.pid))\ntime.sleep(1000)"
    )
    place, errors = Place(), []

    def evaluate():
        try:
            CommandScore(command(tmp_path, body)).at(tmp_path, place)
        except ScoreError as error:
            errors.append(str(error))

    thread = threading.Thread(target=evaluate)
    if early:
        place.end()
    thread.start()
    while not early and not (tmp_path / "child").exists():
        time.sleep(0.01)
    place.end()
    thread.join()  # which ends only when all that held its output has
    assert "exit code -9" in errors[0]
