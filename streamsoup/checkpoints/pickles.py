"""Read a pickle as data. Nothing is imported, called or built but plain containers.

Where a pickle asks for a class or a function, its name stands in the result; where it asks to call one, a record of the
name and the arguments. So there is nothing that a hostile file could run, and no list of what is harmless to keep.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from streamsoup.checkpoints.pickled import Elsewhere, Made, Named, expect_key
from streamsoup.errors import CheckpointError

MAX_PICKLE_BYTES = 1 << 27
# A tensor takes about 45, with an optimiser 150. This bounds memory, too: a step takes at most 220 bytes (a new name;
# an entry of the memo 150, an empty dict 72) and four for each byte of its text, so 4 GB at worst.
_MAX_STEPS = 1 << 24
_MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
# No checkpoint asks for these: one that does means to run something on the machine of whoever loads it.
_HOSTILE_MODULES = frozenset((
    "os", "posix", "nt", "subprocess", "sys", "importlib", "runpy", "shutil", "socket", "pty", "ctypes", "webbrowser",
    "code", "codeop", "pickle", "_pickle", "multiprocessing", "asyncio", "pip", "pdb", "timeit",
))  # fmt: skip
_HOSTILE_BUILTINS = frozenset(("eval", "exec", "compile", "open", "__import__", "input", "breakpoint"))


def read_pickle(raw: bytes, where: str) -> Any:
    """Read a pickle of protocol 2 to 5.

    Parameters
    ----------
    raw : bytes
    where : str
        What it is, for messages.

    Returns
    -------
    object
        None, numbers, text, bytes, lists, tuples, dicts (of any mapping class of Python's), `Named`, `Made`,
        `Elsewhere`; sets are lists.

    Raises
    ------
    CheckpointError
        If it is damaged, too large, or names what only a hostile file would.
    """
    machine = _Machine(raw, where)
    try:
        return machine.run()
    except (
        IndexError, KeyError, TypeError, ValueError, EOFError, struct.error, OverflowError, RecursionError
    ) as error:  # fmt: skip
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{where}: its pickle is damaged at byte {machine.at:,} of {len(raw):,}. Export or download it again.",
            path=where,
        ) from None


class _Machine:
    """Pickle's stack machine."""

    def __init__(self, raw: bytes, where: str) -> None:
        self.raw = raw
        self.where = where
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.named: dict[str, Named] = {}

    def run(self) -> Any:
        steps, raw = _STEPS, self.raw
        for _ in range(_MAX_STEPS):
            code = raw[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise CheckpointError(
                    f"{self.where}: its pickle has an instruction ({bytes([code])!r}) that PyTorch does not write. "
                    "Save it again with torch.save.",
                    path=self.where,
                )
            step(self)
        raise CheckpointError(
            f"{self.where}: its pickle has more than {_MAX_STEPS:,} instructions. Save the model without the rest.",
            path=self.where,
        )

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.raw):
            raise EOFError
        piece = self.raw[self.at : end]
        self.at = end
        return piece

    def one(self) -> int:
        value = self.raw[self.at]
        self.at += 1
        return value

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        end = self.raw.index(b"\n", self.at)
        text = self.raw[self.at : end].decode()
        self.at = end + 1
        return text

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def name(self, module: Any, name: Any) -> None:
        # Before anything is made of them: the text of lists that are in each other many times has no end.
        if type(module) is not str or type(name) is not str:
            raise TypeError
        whole = f"{module}.{name}"
        found = self.named.get(whole)
        if found is None:
            builtin = module in ("builtins", "__builtin__", "io", "_io") and name.split(".")[0] in _HOSTILE_BUILTINS
            if builtin or module.split(".")[0] in _HOSTILE_MODULES:
                raise CheckpointError(
                    f"{self.where}: wants to use {whole[:100]} when it is loaded, which no checkpoint needs. Nothing "
                    "of it was run; do not load this file with anything else.",
                    path=self.where,
                )
            found = self.named[whole] = Named(whole)
        self.stack.append(found)

    def make(self, maker: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple) or not isinstance(maker, Named | Made):
            raise TypeError
        if isinstance(maker, Named) and maker.name in _MAPPINGS and _makes_empty(maker.name, arguments):
            self.stack.append({})
            return
        made = Made(maker.name, arguments)
        if isinstance(maker, Made):
            made.fill([maker])
        self.stack.append(made)

    def make_object(self) -> None:
        arguments = self.stack.pop()
        self.make(self.stack.pop(), arguments)

    def make_with_keywords(self) -> None:
        keywords = self.stack.pop()
        self.make_object()
        if not isinstance(self.stack[-1], Made):
            raise TypeError
        self.stack[-1].fill([keywords])

    def give_state(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Made):
            if target.state is not None:
                target.fill([target.state])
            target.state = state

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target.fill(items[1::2])
            return
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key in items[::2]:
            expect_key(key)
        target.update(zip(items[::2], items[1::2], strict=True))

    def set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target.fill(items)
            return
        if type(target) is not list:
            raise TypeError
        target.extend(items)

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError
        self.stack[-count:] = [items]

    def dict_since_mark(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)


def _makes_empty(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a mapping is made empty, to be filled afterwards as `pickle` does it."""
    return not arguments or (name.endswith("defaultdict") and len(arguments) == 1)


def _text(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(size)).decode("utf-8", "surrogatepass"))


def _bytes(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(size)))


def _signed(m: _Machine, count: int) -> int:
    return int.from_bytes(m.take(count), "little", signed=True)


def _global(m: _Machine) -> None:
    module = m.line()
    m.name(module, m.line())


def _stack_global(m: _Machine) -> None:
    name = m.stack.pop()
    m.name(m.stack.pop(), name)


_BY_CODE: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.since_mark(),
    b"2": lambda m: m.push(m.stack[-1]),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(_signed(m, 4)),
    b"K": lambda m: m.push(m.one()),
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": lambda m: m.push(_signed(m, m.one())),
    b"\x8b": lambda m: m.push(_signed(m, m.number(4))),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": _text(4),
    b"\x8c": lambda m: m.push(m.take(m.one()).decode("utf-8", "surrogatepass")),
    b"\x8d": _text(8),
    b"B": _bytes(4),
    b"C": _bytes(1),
    b"\x8e": _bytes(8),
    b"\x96": _bytes(8),  # BYTEARRAY8
    b"U": _bytes(1),
    b"T": _bytes(4),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.since_mark()),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.since_mark()),
    b"}": lambda m: m.push({}),
    b"d": lambda m: m.dict_since_mark(),
    b"s": lambda m: m.set_one(),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"\x8f": lambda m: m.push([]),  # EMPTY_SET
    b"\x90": lambda m: m.extend(m.since_mark()),
    b"\x91": lambda m: m.push(m.since_mark()),  # FROZENSET
    b"h": lambda m: m.push(m.memo[m.one()]),
    b"j": lambda m: m.push(m.memo[m.number(4)]),
    b"q": lambda m: m.remember(m.one()),
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": lambda m: m.make_object(),
    b"\x81": lambda m: m.make_object(),  # NEWOBJ
    b"\x92": lambda m: m.make_with_keywords(),
    b"b": lambda m: m.give_state(),
    b"Q": lambda m: m.push(Elsewhere(m.stack.pop())),
}
_STEPS = {code[0]: step for code, step in _BY_CODE.items()}
