"""Compile the fused kernels for GPUs that need not be there, and print what matters of its PTX, as JSON."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamsoup.kernels.codes import F64, ITEMSIZE
from streamsoup.kernels.triton_loops import OPTIONS, combine_blocks, gram_blocks

NARROW = [code for code in range(8) if code != F64]
POINTERS = {1: "*u8", 2: "*u16", 4: "*u32", 8: "*u64"}


def ptx(capability: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
    """Return a kernel's PTX; ptxas has assembled it, too."""
    pointers = {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, pointers)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**OPTIONS, **options})
    assert made.asm["cubin"]
    return str(made.asm["ptx"])


def combined(capability: int, constants: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Summarize `combine_blocks`."""
    kinds = {
        "table": "*i64",
        "out": POINTERS[ITEMSIZE[constants["OUT"]]],
        "found": "*i64",
        "digests": "*i64",
        "n": "i32",
    }
    text = ptx(capability, combine_blocks, kinds, constants, **options)
    return {"capability": capability, **constants, **summary(text)}


def multiplied(constants: dict[str, Any]) -> dict[str, Any]:
    """Summarize `gram_blocks`."""
    kinds = {"table": "*i64", "out": "*fp64", "n": "i32", "centre": "i32"}
    return {**constants, **summary(ptx(90, gram_blocks, kinds, constants))}


def constants(first: int, rest: int, out: int, *, hashed: bool, whole: bool, single: bool = False) -> dict[str, Any]:
    return {
        "FIRST": first, "REST": rest, "OUT": out, "FIRST_HASHED": hashed, "REST_HASHED": True, "WHOLE": whole,
        "SINGLE": single,
    }  # fmt: skip


def summary(text: str) -> dict[str, Any]:
    """Return how often each float operation occurs, and what else tells something."""
    names = re.findall(r"\b(?:add|sub|mul|fma|div|rcp)\.[a-z0-9.]*f(?:32|64)(?:x2)?\b", text)
    return {
        "operations": {name: names.count(name) for name in set(names)},
        "flushes": text.count(".ftz"),
        "to float64": text.count("cvt.f64."),
        "two words at once": text.count("ld.global.v2.b64"),
    }


def main() -> None:
    found = []
    for code in range(8):
        # A soup, and a running sum or a later group; 90 is Hopper, 80 is Ampere.
        for capability in (80, 90):
            found.append(combined(capability, constants(code, code, code, hashed=True, whole=capability == 90)))
        found.append(combined(90, constants(F64, code, (code + 3) % 8, hashed=False, whole=code % 2 == 0)))
    gram = [multiplied({"CODE": code, "CENTRED": code % 2 == 0, "WHOLE": code < 2}) for code in (0, 1, 2, 4)]
    # A later group, and a soup, as above.
    kinds = [constants(first, c, c, hashed=False, whole=True, single=True) for c in NARROW for first in (F64, c)]
    # Blackwell, which 120 is one of, has instructions for two float32 at once.
    single = [combined((80, 90, 120)[k % 3], kind) for k, kind in enumerate(kinds)]
    fused, fused_single = (
        combined(90, constants(0, 0, 0, hashed=True, whole=True, single=s), enable_fp_fusion=True)
        for s in (False, True)
    )
    json.dump(
        {"found": found, "gram": gram, "single": single, "fused": fused, "fused single": fused_single}, sys.stdout
    )


if __name__ == "__main__":
    main()
