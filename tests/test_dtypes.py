import pytest
from factory import DTYPES as NUMPY
from factory import FLOATS

from streamsoup.dtypes import BY_NAME, DTYPES, parse_float_dtype
from streamsoup.errors import RecipeError
from streamsoup.kernels import codes


def test_codes_are_those_of_the_kernels():
    for name in FLOATS:
        attribute = {"F8_E4M3": "F8_E4M3"}.get(name, name)
        assert BY_NAME[name].kernel_code == getattr(codes, attribute)
        assert BY_NAME[name].itemsize == codes.ITEMSIZE[BY_NAME[name].kernel_code]
    for dtype in DTYPES:
        assert dtype.kernel_code < len(codes.ITEMSIZE)
        if dtype.is_float:
            assert dtype.itemsize == codes.ITEMSIZE[dtype.kernel_code]


def test_every_dtype_of_the_format_is_known_and_no_other():
    assert set(BY_NAME) == {
        "BOOL",
        "F4",
        "F6_E2M3",
        "F6_E3M2",
        "U8",
        "I8",
        "F8_E5M2",
        "F8_E4M3",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "I16",
        "U16",
        "F16",
        "BF16",
        "I32",
        "U32",
        "F32",
        "C64",
        "F64",
        "I64",
        "U64",
    }


def test_indices_are_positions():
    assert [d.index for d in DTYPES] == list(range(len(DTYPES)))


def test_only_floats_are_averaged():
    assert {name for name, dtype in BY_NAME.items() if dtype.is_float} == set(FLOATS)
    assert {name for name, dtype in BY_NAME.items() if dtype.is_fp8} == {f for f in FLOATS if f.startswith("F8")}


@pytest.mark.parametrize("name", NUMPY)
def test_sizes_are_those_of_numpy(name):
    assert BY_NAME[name].itemsize == NUMPY[name].itemsize
    assert BY_NAME[name].nbytes(7) == 7 * NUMPY[name].itemsize


@pytest.mark.parametrize(("name", "elements", "want"), [("F4", 6, 3), ("F6_E2M3", 4, 3), ("F6_E3M2", 8, 6)])
def test_packed_sizes(name, elements, want):
    assert BY_NAME[name].nbytes(elements) == want


def test_torch_names_are_torchs():
    import torch

    for dtype in BY_NAME.values():
        if dtype.torch_name:
            kind = getattr(torch, dtype.torch_name)
            assert torch.empty(0, dtype=kind).element_size() == dtype.itemsize


@pytest.mark.parametrize("text", ["bf16", "bfloat16", "torch.bfloat16", "BF16", "BFloat16"])
def test_usual_names_are_understood(text):
    assert parse_float_dtype(text).name == "BF16"


@pytest.mark.parametrize("text", ["int8", "", "float", "float33", "SUM64", "pair", "PAIR", "sum32", "f4", "F8_E8M0"])
def test_what_is_no_float_dtype_is_refused(text):
    if text == "float":
        assert parse_float_dtype(text).name == "F32"
        return
    with pytest.raises(RecipeError, match="Choose one of bfloat16"):
        parse_float_dtype(text)
