"""Compiled loops as object code on disk, loaded by llvmlite alone.

Importing numba and loading a loop from its cache takes 0.4 s, as long as all the arithmetic on 7 GB; this takes 0.05. A
loop can be stored if it takes addresses and numbers only, and its code refers to nothing outside: `native` compiles it
without wrappers and reference counting. Whatever goes wrong here, numba and its cache do as well.
"""

import ctypes
import hashlib
import importlib.util
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from .object_files import outside_symbols

__all__ = ["entry", "fingerprint", "target_machine"]

_I, _U, _F = ctypes.c_int64, ctypes.c_uint64, ctypes.c_double
# Result and arguments, as in `native`.
_TYPES: dict[str, tuple[Any, ...]] = {
    "combine": (_I, _U, _I, _U, _U, _F, _F, _I, _I, _I, _U, _I, _U, _U, _U, _U, _U, _I, _I, _I, _U),
    "digest": (_U, _U, _I, _I, _I),
    "low_rank": (_I, _U, _I, _U, *(_I,) * 5, _U, _U, _I, _F),
    "spread": (_I, _U, *(_I,) * 5, _U, *(_I,) * 3),
    **dict.fromkeys(("dequantise", "largest", "quantise"), (_I, _U, *(_I,) * 7, _U, _I, _U)),
}
_TYPES["singles"] = _TYPES["combine"]
# Settings of numba that change no code; with any other, numba does all.
_HARMLESS = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER"}
_LOCK = threading.Lock()
_ENTRIES: dict[str, Callable[..., int]] = {}
_ENGINES: list[Any] = []  # what owns the code


def entry(name: str) -> Callable[..., int]:
    """Return a loop by its name: from the disk, or compiled now and kept there, or numba's.

    Parameters
    ----------
    name : {"combine", "digest", "dequantise", "largest", "low_rank", "quantise", "spread"}
        It takes what the loop in `native` takes, and releases the GIL.
    """
    found = _ENTRIES.get(name)
    if found is not None:
        return found
    with _LOCK:
        if name not in _ENTRIES:
            _ENTRIES[name] = _from_store(name) or _from_numba(name)
        return _ENTRIES[name]


@cache
def fingerprint() -> int:
    """Return a number that changes with the kernels' sources.

    numba's disk cache notices an edit only in the file of the function itself, not in what that calls, but it
    does key on closure variables: every cached kernel here closes over this one.
    """
    digest = hashlib.blake2b(digest_size=7)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "little")


def target_machine() -> Any:
    """Return LLVM's idea of this machine, with the options that numba has: a new one, as an engine frees its own."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = _processor()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="default", codemodel="jitdefault", jit=True
    )


def _processor() -> tuple[str, str]:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _from_numba(name: str) -> Any:
    from . import native

    return native.built(name)


def _from_store(name: str) -> Callable[..., int] | None:
    if any(key.startswith("NUMBA_") and key not in _HARMLESS for key in os.environ):
        return None
    try:
        key = _key(name)
        found = next((code for folder in _folders() if (code := _read(folder, name, key)) is not None), None)
        if found is None:
            found = _compiled(name)
            _write(name, key, found)
        return _linked(name, found) if found else None
    except Exception:  # numba needs none of this
        return None


def _compiled(name: str) -> bytes:
    """Return an object file that can be linked, or nothing if what was compiled cannot.

    Nothing is kept too: it is not tried again. So only finished code is judged; trouble on the way to it may pass, and
    is raised.
    """
    from . import native

    code = native.object_code(name, _symbol(name))
    try:
        if outside_symbols(code):  # what LLVM does not find ends the process
            return b""
        _linked(name, code)
    except ValueError:  # another format of object files, or no such function in it
        return b""
    return code


def _symbol(name: str) -> str:
    return f"streamsoup_{name}"


def _key(name: str) -> bytes:
    """Hash what decides the code: sources, compilers and processor."""
    import llvmlite
    import llvmlite.binding as llvm

    numba = importlib.util.find_spec("numba")
    version = Path(str(numba and numba.origin)).with_name("_version.py").read_bytes()
    parts = (name, fingerprint(), llvmlite.__version__, version, llvm.get_default_triple(), *_processor())
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _folders() -> Iterator[Path]:
    """Where code may lie, the first that can be written being the one to write."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(given)
        return
    yield Path(__file__).with_name("__pycache__")
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative path is to be ignored: XDG Base Directory Specification.
    yield (caches if caches.is_absolute() else Path.home() / ".cache") / "streamsoup"


def _file(folder: Path, name: str, key: bytes) -> Path:
    return folder / f"stored.{name}-{key.hex()}.o"


def _checksum(key: bytes, code: bytes) -> bytes:
    return hashlib.blake2b(key + code, digest_size=32).digest()


@contextmanager
def _opened(path: Path | str, flags: int, folder: int | None = None) -> Iterator[int]:
    """Open a file or a folder that nobody but this user and root can have written; others raise OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=folder)
    try:
        found = os.fstat(descriptor)
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{path}: others can write it")
        yield descriptor
    finally:
        os.close(descriptor)


def _read(folder: Path, name: str, key: bytes) -> bytes | None:
    """Return the code, nothing if it is of no use, or None if it was not compiled yet or others could have written it.

    The folder is opened first, and the file in it: neither can be exchanged once it was looked at.
    """
    name_there = _file(folder, name, key).name
    try:
        with (
            _opened(folder, os.O_DIRECTORY) as place,
            _opened(name_there, os.O_NOFOLLOW, place) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            found = file.read()
    except OSError:
        return None
    return found[32:] if found[:32] == _checksum(key, found[32:]) else None


def _write(name: str, key: bytes, code: bytes) -> None:
    for folder in _folders():
        with suppress(OSError):
            _make(folder)
            with _opened(folder, os.O_DIRECTORY):
                _publish(_file(folder, name, key), _checksum(key, code) + code)
            return


def _make(folder: Path) -> None:
    """Make a folder and those above it, for this user alone."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(0o700, exist_ok=True)


def _publish(target: Path, content: bytes) -> None:
    """Write a file under a name that nobody can guess, and rename it: links are not followed."""
    import tempfile

    descriptor, unfinished = tempfile.mkstemp(prefix=f"{target.stem}.", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, 0o644)  # what root compiled serves all
        os.replace(unfinished, target)
    except BaseException:
        os.unlink(unfinished)
        raise


def _linked(name: str, code: bytes) -> Callable[..., int]:
    """Make a function of an object file."""
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(_symbol(name))
    if not address:
        raise ValueError(f"no {_symbol(name)} in the object file")
    _ENGINES.append(engine)
    result, *arguments = _TYPES[name]
    pointer = ctypes.c_void_p
    function = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, *arguments)(address)

    def call(*given: Any) -> int:
        value, unused = result(), pointer()
        if function(ctypes.addressof(value), ctypes.addressof(unused), *given):
            raise RuntimeError(f"{name}: the compiled loop failed.")
        return int(value.value)

    return call
