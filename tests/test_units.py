import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsoup.errors import RecipeError
from streamsoup.units import format_binary, format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("512MiB", 512 * 2**20),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("1.5GiB", 3 * 2**29),
        (".5k", 500),
        ("1048576", 1048576),
        (4096, 4096),
        ("7B", 7),
        (" 2 TiB ", 2**41),
        ("1T", 10**12),
    ],
)
def test_sizes_are_read_the_way_people_write_them(text, want):
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "0", "-1", "MiB", "5 GX", "1e9", "5GB!", "0.1", "nan", "inf", "1,5GB", -3, 0])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="is not a size"):
        parse_bytes(text)


@given(st.integers(1, 2**62))
def test_whole_bytes_are_exact(size):
    assert parse_bytes(str(size)) == size


@pytest.mark.parametrize(
    ("size", "want"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (7_410_000_000, "7.41 GB"), (5e12, "5 TB")]
)
def test_decimal_sizes(size, want):
    assert format_bytes(size) == want


@pytest.mark.parametrize(("size", "want"), [(1023, "1023 B"), (2**28, "256 MiB"), (2**31, "2 GiB"), (2**40, "1 TiB")])
def test_binary_sizes(size, want):
    assert format_binary(size) == want


@given(st.integers(1, 2**50))
def test_a_written_binary_size_is_read_back_to_four_digits(size):
    assert abs(parse_bytes(format_binary(size)) - size) <= size * 1e-3 + 1


@pytest.mark.parametrize(
    ("count", "want"), [(5, "5"), (9_999, "9,999"), (12_000, "12 k"), (463_000_000, "463 M"), (7_000_000_000, "7 B")]
)
def test_counts(count, want):
    assert format_count(count) == want


@pytest.mark.parametrize(
    ("seconds", "want"), [(0.84, "0.84 s"), (12.4, "12 s"), (72, "1 min 12 s"), (3600, "1 h 00 min")]
)
def test_durations(seconds, want):
    assert format_seconds(seconds) == want
