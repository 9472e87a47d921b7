"""The dtypes of the safetensors format, as plain data.

A dtype with a kernel code can be averaged; the others are copied when they are identical in all ingredients.
The codes are those of ``streamsoup.kernels.codes`` (a test compares them), repeated here so that a plan can be
made without importing a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamsoup.errors import RecipeError


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype of the format.

    Attributes
    ----------
    name : str
        As written in a header, ``BF16``.
    torch_name : str
        The name in torch, ``bfloat16``; empty where torch has none.
    bits : int
        Bits an element (fp4 and fp6 are packed).
    index : int
        Position in `DTYPES`, the number kept in packed tables.
    kernel_code : int
        Code of the kernels, or -1 where the numbers are only ever copied.
    """

    name: str
    torch_name: str
    bits: int
    index: int
    kernel_code: int

    @property
    def is_wide(self) -> bool:
        """Whether sums with it are kept in double-double."""
        return self.name in ("F64", "PAIR")

    @property
    def is_float(self) -> bool:
        """Whether tensors of this dtype are averaged (and not only copied)."""
        return self.kernel_code >= 0

    @property
    def is_fp8(self) -> bool:
        """Whether this is an 8-bit float."""
        return self.is_float and self.bits == 8

    @property
    def itemsize(self) -> int:
        """Bytes an element; packed dtypes count as single bytes."""
        return max(1, self.bits // 8)

    def nbytes(self, elements: int) -> int:
        """Bytes of so many elements."""
        return (elements * self.bits + 7) // 8


_ROWS = (
    ("BOOL", "bool", 8, -1),
    ("U8", "uint8", 8, -1),
    ("I8", "int8", 8, -1),
    ("I16", "int16", 16, -1),
    ("U16", "uint16", 16, -1),
    ("I32", "int32", 32, -1),
    ("U32", "uint32", 32, -1),
    ("I64", "int64", 64, -1),
    ("U64", "uint64", 64, -1),
    ("C64", "complex64", 64, -1),
    ("F4", "", 4, -1),
    ("F6_E2M3", "", 6, -1),
    ("F6_E3M2", "", 6, -1),
    ("F8_E8M0", "float8_e8m0fnu", 8, -1),
    ("BF16", "bfloat16", 16, 0),
    ("F16", "float16", 16, 1),
    ("F32", "float32", 32, 2),
    ("F64", "float64", 64, 3),
    ("F8_E4M3", "float8_e4m3fn", 8, 4),
    ("F8_E5M2", "float8_e5m2", 8, 5),
    ("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, 6),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, 7),
)
# Running sums: never in a file of the format, and a float64 sum is no float64 ingredient (see `is_wide`).
_SUM_ROWS = (
    ("SUM32", "", 32, 2),
    ("SUM64", "", 64, 3),
    ("PAIR", "", 128, 8),
)
DTYPES = tuple(DType(name, torch, bits, i, code) for i, (name, torch, bits, code) in enumerate((*_ROWS, *_SUM_ROWS)))
BY_NAME = {dtype.name: dtype for dtype in DTYPES[: len(_ROWS)]}
SUM32, SUM64, PAIR = DTYPES[len(_ROWS) :]
_BY_ANY_NAME = {
    **{name.lower(): dtype for name, dtype in BY_NAME.items()},
    **{dtype.torch_name: dtype for dtype in BY_NAME.values() if dtype.torch_name},
    "half": BY_NAME["F16"],
    "float": BY_NAME["F32"],
    "double": BY_NAME["F64"],
    "fp16": BY_NAME["F16"],
    "fp32": BY_NAME["F32"],
    "fp64": BY_NAME["F64"],
}


def find_dtype(text: str) -> DType | None:
    """Find a dtype of the format by any of its usual names, those of torch and numpy too; None if there is none."""
    return _BY_ANY_NAME.get(text.removeprefix("torch.").lower())


def parse_float_dtype(text: str) -> DType:
    """Find a float dtype by any of its usual names (``bf16``, ``bfloat16``, ``torch.bfloat16``, ``BF16``).

    Raises
    ------
    RecipeError
        If no float dtype has that name.
    """
    dtype = find_dtype(str(text))
    if dtype is None or not dtype.is_float:
        choices = ", ".join(d.torch_name for d in BY_NAME.values() if d.is_float)
        raise RecipeError(f"{text!r} is not a float dtype. Choose one of {choices}.")
    return dtype
