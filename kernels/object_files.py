"""What an object file refers to."""

import struct

__all__ = ["outside_symbols"]


def outside_symbols(code: bytes) -> list[str]:
    """Return the names of the symbols that a 64-bit ELF object file uses and does not define.

    Raises
    ------
    ValueError
        If it is another kind of file.

    Notes
    -----
    Source: System V ABI, chapters "Object Files" and "Symbol Table".
    """
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no little-endian 64-bit ELF file")
    (sections_at,) = struct.unpack_from("<Q", code, 0x28)
    section_bytes, count = struct.unpack_from("<HH", code, 0x3A)
    sections = [struct.unpack_from("<IIQQQQII", code, sections_at + section_bytes * i) for i in range(count)]
    found = []
    for _, kind, _, _, begin, nbytes, strings, _ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        for at in range(begin, begin + nbytes, 24):
            name, _, _, section = struct.unpack_from("<IBBH", code, at)
            if name and not section:
                start = sections[strings][4] + name
                found.append(code[start : code.index(b"\0", start)].decode())
    return found
