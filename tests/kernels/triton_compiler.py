"""Compile the fused kernel for GPUs that need not be there, and print what matters of its PTX, as JSON."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamsoup.kernels.codes import F64, ITEMSIZE
from streamsoup.kernels.triton_loops import OPTIONS, combine_blocks

POINTERS = {1: "*u8", 2: "*u16", 4: "*u32", 8: "*u64"}


def ptx(capability: int, constants: dict[str, Any], **options: Any) -> str:
    """Return the kernel's PTX; ptxas has assembled it, too."""
    signature = {"table": "*i64", "out": POINTERS[ITEMSIZE[constants["OUT"]]], "found": "*i64", "digests": "*i64"}
    signature |= {"n": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(combine_blocks, signature, constants, {(k,): [["tt.divisibility", 16]] for k in range(4)})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**OPTIONS, **options})
    assert made.asm["cubin"]
    return str(made.asm["ptx"])


def constants(first: int, rest: int, out: int, *, hashed: bool, whole: bool) -> dict[str, Any]:
    return {
        "FIRST": first, "REST": rest, "OUT": out, "FIRST_HASHED": hashed, "REST_HASHED": True, "WHOLE": whole
    }  # fmt: skip


def summary(text: str) -> dict[str, Any]:
    """Return how often each float64 operation occurs, and what else tells something."""
    names = re.findall(r"\b(?:add|sub|mul|fma|div|rcp)\.[a-z0-9.]*f64\b", text)
    return {
        "operations": {name: names.count(name) for name in set(names)},
        "flushes": text.count(".ftz"),
        "two words at once": text.count("ld.global.v2.b64"),
    }


def main() -> None:
    found = []
    for code in range(8):
        # A soup, and a running sum or a later group; 90 is Hopper, 80 is Ampere.
        for capability in (80, 90):
            soup = constants(code, code, code, hashed=True, whole=capability == 90)
            found.append({"capability": capability, **soup, **summary(ptx(capability, soup))})
        later = constants(F64, code, (code + 3) % 8, hashed=False, whole=code % 2 == 0)
        found.append({"capability": 90, **later, **summary(ptx(90, later))})
    fused = summary(ptx(90, constants(0, 0, 0, hashed=True, whole=True), enable_fp_fusion=True))
    json.dump({"found": found, "fused": fused}, sys.stdout)


if __name__ == "__main__":
    main()
