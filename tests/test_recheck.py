"""A soup that goes on is never a mixture of two files of one ingredient, whatever the samples say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factory import write_checkpoint

import streamsoup
from streamsoup.checkpoints.identity import SAMPLE_BYTES
from streamsoup.errors import ChangedIngredientError


class StopError(Exception):
    pass


def interrupted(tmp_path, monkeypatch, **options):
    """Leave a soup whose tiles are all done, but which was not published."""
    rng = np.random.default_rng(0)
    runs = [
        str(write_checkpoint(tmp_path / f"run{i}", {"w": rng.standard_normal(40_000).astype(np.float32)}))
        for i in range(3)
    ]

    def stop(*_, **__):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("streamsoup.workspace.Workspace.publish", stop)
        with pytest.raises(StopError):
            streamsoup.soup(runs, tmp_path / "soup", **options)
    return runs


@pytest.mark.parametrize("read_mode", ["map", "plain"])
@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_a_change_that_no_sample_sees_is_noticed(tmp_path, monkeypatch, read_mode, device):
    runs = interrupted(tmp_path, monkeypatch)
    file = Path(runs[1]) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    assert len(raw) > 10 * SAMPLE_BYTES
    raw[-3] ^= 1  # the last element: samples are taken from the middle
    file.write_bytes(raw)
    execution = streamsoup.Execution(read_mode=read_mode, device=device)
    with pytest.raises(ChangedIngredientError, match=r"w: its data in .*run1 changed"):
        streamsoup.resume(tmp_path / "soup", execution)
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_the_same_bytes_written_again_go_on_with_any_tile_size(tmp_path, monkeypatch, device):
    runs = interrupted(tmp_path, monkeypatch)
    for run in runs:
        file = Path(run) / "model.safetensors"
        raw = file.read_bytes()
        file.unlink()
        file.write_bytes(raw)
    small = streamsoup.Execution(read_mode="plain", device=device, budget_bytes=17 << 20, workers=1)
    streamsoup.resume(tmp_path / "soup", small)
    streamsoup.soup(runs, tmp_path / "fresh")
    names = [tmp_path / name / "model.safetensors" for name in ("soup", "fresh")]
    assert names[0].read_bytes() == names[1].read_bytes()
