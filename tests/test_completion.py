"""Completion scripts: a bash that sources one completes commands, options, values and paths."""

from __future__ import annotations

import subprocess
import sys

import pytest

from streamsoup.cli import main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    pytest.importorskip("shtab", reason="needs streamsoup[completion]")
    done = subprocess.run(
        [sys.executable, "-m", "streamsoup", "completion", "bash"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "streamsoup.bash"
    path.write_text(done.stdout)
    return path


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["gr"], {"greedy"}),
        (["co"], {"convert", "completion"}),
        (["soup", "--bud"], {"--budget"}),
        (["convert", "--nonfinite", ""], {"keep", "error", "warn", "allow"}),
        (["greedy", "--sums", "d"], {"device", "disk"}),
        (["soup", "runs/a", "--no-"], {"--no-keep", "--no-sync"}),
        (["verify", "so"], {"soup", "soup.safetensors"}),
        (["learn", "--workdir", "so"], {"soup"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["soup", "--nonsense"], set()),
    ],
)
def test_bash_completes(script, tmp_path, words, wanted):
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup.safetensors").touch()
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"source {script}\n"
        "name=$(complete -p streamsoup | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
        f"COMP_WORDS=(streamsoup {quoted}); COMP_CWORD={len(words)}\n"
        '$name streamsoup; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    found = {line for line in done.stdout.splitlines() if line}
    assert wanted <= found, done.stderr
    if words[-1].startswith(("gr", "--", "co", "d")) or not wanted:
        assert found == wanted


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts_that_name_all_commands(script, shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "streamsoup" in text
    for name in ("soup", "convert", "verify", "mergekit"):
        assert name in text
    assert "average checkpoints into one" in text


def test_without_shtab_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "streamsoup: Completion needs shtab: pip install 'streamsoup[completion]'.\n"
