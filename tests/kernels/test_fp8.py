import subprocess
import sys

import numpy as np
import pytest
from exact import DTYPES, NAMES

from streamsoup.kernels.fp8 import FORMATS, decode, decode_tables


@pytest.mark.parametrize("code", sorted(FORMATS), ids=NAMES[4:])
def test_every_code_means_what_ml_dtypes_says(code):
    want = np.arange(256, dtype=np.uint8).view(DTYPES[code]).astype(np.float64)
    got = decode(code)
    np.testing.assert_array_equal(got, want)
    finite = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[finite]), np.signbit(want[finite]))


def test_float32_tables_are_exact():
    for row, code in zip(decode_tables(), sorted(FORMATS), strict=True):
        np.testing.assert_array_equal(row.astype(np.float64), decode(code))


def test_importing_the_kernels_imports_neither_numba_nor_torch():
    program = (
        "import sys, streamsoup.kernels, streamsoup.kernels.combine, streamsoup.kernels.fp8;"
        "sys.exit(bool({'numba', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
