"""Loops as object code on disk: the bits of numba's, without numba; and numba, whatever goes wrong."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

from streamsoup.kernels import codes, native, stored
from streamsoup.kernels.fp8 import encoder_parameters
from streamsoup.kernels.given import division, limits, scratch
from streamsoup.kernels.object_files import outside_symbols

CHECK = """
import ctypes, sys
import numpy as np
from streamsoup.kernels import codes
from streamsoup.kernels.combine import combine, digest
rows, out = np.arange(3000, dtype=np.float32).reshape(2, 1500), np.zeros(1500, np.float32)
places = np.array([row.ctypes.data for row in rows], np.uint64)
one, digests, bad = np.ones(2, np.uint8), np.zeros(2, np.uint64), np.zeros(2, np.int64)
kinds = np.full(2, codes.F32, np.uint8)
combine(places, kinds, np.ones(2), 2.0, 1500, 0, out.ctypes.data, codes.F32, one, digests, bad)
assert (out == rows.mean(0)).all() and digests[0] == digest(int(places[0]), 6000, 4, 0)
print("numba" in sys.modules)
"""


def test_the_next_process_does_without_numba(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=True, timeout=300
        )
        found.append(done.stdout.strip())
    assert found == ["True", "False"]
    assert len(list(tmp_path.glob("stored.*.o"))) == 2


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("code", [codes.BF16, codes.F16, codes.F32, codes.F8_E4M3, codes.F8_E5M2])
def test_stored_loops_have_the_bits_of_numbas(code, weight):
    rng = np.random.default_rng(code)
    sources, elements, size = 5, 5000, codes.ITEMSIZE[code]
    rows = rng.integers(0, 256, (sources, elements * size), np.uint8)
    places = np.array([row.ctypes.data for row in rows], np.uint64)
    kinds, weights = np.full(sources, code, np.uint8), np.full(sources, weight)
    (reciprocal, mode), bounds = division(5.0), limits(sources, code, 5.0)
    tables = [table.ctypes.data for table in encoder_parameters()]
    results = []
    for loop in (stored.entry("combine"), native.built("combine")):
        out, room = np.zeros(elements * size, np.uint8), scratch(sources)
        found = np.ones(sources, np.uint8), np.zeros(sources, np.uint64), np.zeros(sources, np.int64)
        overflowed = loop(
            places.ctypes.data, sources, kinds.ctypes.data, weights.ctypes.data, 5.0, reciprocal, mode, elements, 7,
            out.ctypes.data, code, *(array.ctypes.data for array in found), *tables, *bounds, room.ctypes.data,
        )  # fmt: skip
        results.append((overflowed, out.tobytes(), *(array.tobytes() for array in found)))
    assert results[0] == results[1]
    assert stored.entry("digest")(int(places[0]), rows.shape[1], size, 3) == native.built("digest")(
        int(places[0]), rows.shape[1], size, 3
    )


OUTSIDE = "declare i32 @nowhere()\ndefine i32 @streamsoup_digest() { %a = call i32 @nowhere() ret i32 %a }"
ANOTHER = "define i32 @another() { ret i32 0 }"


@pytest.mark.parametrize("text", [OUTSIDE, ANOTHER, None])
def test_code_that_refers_to_anything_outside_or_is_none_is_of_no_use(monkeypatch, text):
    code = stored.target_machine().emit_object(llvm.parse_assembly(text)) if text else b"MZ"
    monkeypatch.setattr(native, "object_code", lambda *_: code)
    assert stored._compiled("digest") == b""
    assert not text or outside_symbols(code) == (["nowhere"] if text == OUTSIDE else [])


def test_an_engine_that_is_given_up_takes_no_other_with_it():
    another = bytes(stored.target_machine().emit_object(llvm.parse_assembly(ANOTHER)))
    machine = stored.target_machine()
    with pytest.raises(ValueError, match="no streamsoup_digest"):
        stored._linked("digest", another)
    gc.collect()
    # Had the engine owned this one, the process would end here.
    assert bytes(machine.emit_object(llvm.parse_assembly(ANOTHER))) == another
    assert machine is not stored.target_machine()


def test_a_damaged_or_foreign_file_is_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new"))
    stored._write("digest", b"key", b"code")
    folder = tmp_path / "new"
    assert stored._read(folder, "digest", b"key") == b"code"
    assert stored._read(folder, "digest", b"another key") is None
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for bad in (whole[:-1], whole + b"x", b"", whole[:-1] + b"x"):
        file.write_bytes(bad)
        assert stored._read(folder, "digest", b"key") is None
    file.write_bytes(whole)
    file.rename(stored._file(folder, "digest", b"another key"))
    assert stored._read(folder, "digest", b"another key") is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder where code is kept, with the code of a loop in it."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    stored._write("digest", b"key", b"code")
    assert stored._read(tmp_path / "cache", "digest", b"key") == b"code"
    return tmp_path / "cache"


@pytest.mark.parametrize("bits", [0o020, 0o002])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_code_that_others_could_have_written_is_not_loaded(folder, what, bits):
    path = stored._file(folder, "digest", b"key") if what == "file" else folder
    path.chmod(path.stat().st_mode | bits)
    assert stored._read(folder, "digest", b"key") is None


@pytest.mark.parametrize("what", ["file", "folder"])
def test_code_of_another_user_is_not_loaded(folder, what, monkeypatch):
    path = stored._file(folder, "digest", b"key") if what == "file" else folder
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    else:
        os.chown(path, 12345, -1)
    assert stored._read(folder, "digest", b"key") is None


def test_nothing_is_written_where_others_can_write_but_in_the_next_place(tmp_path, monkeypatch):
    places = [tmp_path / "shared", tmp_path / "private"]
    for place, mode in zip(places, (0o777, 0o700), strict=True):
        place.mkdir()
        place.chmod(mode)
    monkeypatch.setattr(stored, "_folders", lambda: iter(places))
    stored._write("digest", b"key", b"code")
    assert [len(list(place.iterdir())) for place in places] == [0, 1]


def test_code_is_not_loaded_through_a_link(folder):
    file = stored._file(folder, "digest", b"key")
    file.rename(folder / "elsewhere")
    file.symlink_to("elsewhere")
    assert stored._read(folder, "digest", b"key") is None


def test_writing_follows_no_link(folder):
    mine = folder / "mine"
    mine.write_text("precious")
    target = stored._file(folder, "digest", b"another key")
    for planted in (target, target.with_suffix(f".{os.getpid()}")):
        planted.symlink_to(mine)
    stored._write("digest", b"another key", b"code")
    assert mine.read_text() == "precious"
    assert not target.is_symlink()
    assert stored._read(folder, "digest", b"another key") == b"code"


def test_new_folders_are_for_their_owner_alone_and_nothing_unfinished_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "a" / "b"))
    stored._write("digest", b"key", b"code")
    for made in (tmp_path / "a", tmp_path / "a" / "b"):
        assert made.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError))
    stored._write("digest", b"another key", b"code")
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == [stored._file(tmp_path, "digest", b"key").name]


def test_a_relative_place_for_caches_is_ignored(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, used in (("relative", tmp_path / ".cache"), ("", tmp_path / ".cache"), ("/absolute", Path("/absolute"))):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert list(stored._folders())[-1] == used / "streamsoup"


def test_where_no_file_can_be_written_nothing_fails(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
    stored._write("digest", b"key", b"code")
    assert stored._read(tmp_path / "file" / "below", "digest", b"key") is None


def test_code_that_was_of_no_use_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "object_code", lambda *_: pytest.fail("compiled"))
    stored._write("digest", stored._key("digest"), b"")
    assert stored._from_store("digest") is None


@pytest.mark.parametrize("step", ["compiling", "linking"])
@pytest.mark.parametrize("trouble", [MemoryError, OSError, RuntimeError])
def test_trouble_that_may_pass_is_not_kept(tmp_path, monkeypatch, step, trouble):
    def fail(*_):
        raise trouble

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(stored, "_ENTRIES", {})
    with monkeypatch.context() as here:
        here.setattr(*((native, "object_code") if step == "compiling" else (stored, "_linked")), fail)
        assert stored.entry("digest") is native.built("digest")
    assert not list(tmp_path.glob("stored.*"))
    assert stored._from_store("digest")
    assert len(list(tmp_path.glob("stored.*.o"))) == 1


@pytest.mark.parametrize("change", ["setting", "trouble"])
def test_otherwise_numba_does_it(monkeypatch, change):
    if change == "setting":
        monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    else:
        monkeypatch.setattr(stored, "_key", lambda _: 1 / 0)
    monkeypatch.setattr(stored, "_ENTRIES", {})
    assert stored.entry("digest") is native.built("digest")
