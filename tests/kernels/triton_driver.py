"""Compare the fused kernel with the other two, bit for bit, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so that a test cannot choose. ``triton_driver.py DEVICE CHECK ...``
runs checks by their names (``cpu`` is interpreted, and wants the variable set), and says what was compared.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from exact import DTYPES, UNSIGNED, boundaries, random_finite, run

from streamsoup.kernels import torch_combine, torch_measuring, triton_combine, triton_measuring
from streamsoup.kernels.codes import BF16, BLOCK, F8_E4M3, F8_E5M2FNUZ, F16, F32, F64, ITEMSIZE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DEVICE = sys.argv[1]
ALL = range(8)


def compared(arrays, codes, weights, divisor, out_code, **options):
    """Run all three, and return the answer that they agree on."""
    answer = run("triton", arrays, codes, weights, divisor, out_code, device=DEVICE, **options)
    options.pop("misalign", None)
    for other in ("numba", "torch"):
        judge = run(other, arrays, codes, weights, divisor, out_code, **options)
        np.testing.assert_array_equal(answer.out, judge.out, err_msg=f"{other}: {codes} {out_code} {weights}")
        assert answer[1:] == judge[1:], f"{other}: {codes} {out_code}: {answer[1:]} against {judge[1:]}"
    return answer


def any_bits(rng, code, elements):
    return rng.integers(0, 256, elements * ITEMSIZE[code], dtype=np.uint8).view(DTYPES[code])


def normal(rng, code, elements):
    return rng.standard_normal(elements).astype(DTYPES[code])


def pairs():
    """Every dtype beside every other as first source, later source and output."""
    rng = np.random.default_rng(0)
    for first in ALL:
        for rest in ALL:
            out_code, n = (first + rest) % 8, int(rng.integers(1, 4))
            draw = any_bits if (first + rest // 2) % 2 else normal
            codes = [first] + [rest] * (n - 1)
            compared(
                [draw(rng, code, int(900 + 11 * first + rest)) for code in codes],
                codes,
                [1.0] * n if rest % 2 else rng.standard_normal(n).tolist(),
                [1.0, float(n), -2.0, 0.7][first % 4],
                out_code,
                first_block=int(rng.integers(0, 2**40)),
                hashed=[bool(flag) for flag in rng.integers(0, 2, n)],
            )


def singles():
    """Sums in float32."""
    rng = np.random.default_rng(8)
    for first in ALL:
        for rest in ALL:
            if rest == F64:
                continue
            codes = [first] + [rest] * int(rng.integers(0, 4))
            draw = any_bits if (first + rest) % 2 and first != F64 else normal
            arrays = [draw(rng, code, 900 + 11 * first + rest) for code in codes]
            if first == F64:  # a sum so far
                arrays[0] = arrays[0].astype(np.float32).astype(np.float64)
            weights = rng.standard_normal(len(codes)).tolist()
            compared(arrays, codes, weights, [1.0, 3.0, 0.7][rest % 3], (first + rest) % 8, single=True)


def sizes():
    """Whole blocks, parts of blocks and parts of words; one source and 64."""
    rng = np.random.default_rng(1)
    several = (1, 2, 3, 5, 7, 8, 2041, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK)
    for number, elements in enumerate(2 * several):
        code, n = (BF16, F32, F8_E4M3, F64)[number % 4], 1 + number % 3
        compared([normal(rng, code, elements) for _ in range(n)], [code] * n, [1.0] * n, float(n), code)
    for elements in (BLOCK, 77):
        arrays = [normal(rng, BF16, elements) for _ in range(64)]
        compared(arrays, [BF16] * 64, rng.standard_normal(64).tolist(), 1.5, BF16, first_block=9)


def patterns():
    """Every number of the formats up to 16 bits, and what is special in the others, with all sorts of weights."""
    rng = np.random.default_rng(2)
    for code in ALL:
        if ITEMSIZE[code] == 1:
            array = np.arange(256, dtype=np.uint8).view(DTYPES[code])
        elif ITEMSIZE[code] == 2:
            array = np.arange(1 << 16).astype(np.uint16)[code * 7 :: 13].view(DTYPES[code])
        else:
            kind = UNSIGNED[ITEMSIZE[code]]
            top, mantissa = 8 * ITEMSIZE[code] - 1, 23 if code == F32 else 52
            infinity = ((1 << (top - mantissa)) - 1) << mantissa
            known = [0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, infinity - 1, infinity, infinity + 1, infinity + 99]
            known = np.array([bits | sign for bits in known for sign in (0, 1 << top)], dtype=kind)
            array = np.concatenate([known, any_bits(rng, code, 400).view(kind)]).view(DTYPES[code])
        shuffled = rng.permutation(array.view(UNSIGNED[ITEMSIZE[code]])).view(DTYPES[code])
        compared([array, shuffled], [code] * 2, [1.0, 1.0], 2.0, code)
    for weights in ([0.0, -0.0], [-1.0, 1.0], [5e-324, 1e-310], [1e300, -1e300], [2.0**-150, 2.0**-149]):
        for code in (F32, F64, F16):
            source = random_finite(rng, code, 300)
            compared([any_bits(rng, code, 300), source], [code] * 2, weights, -0.3, (code + 1) % 4)
    zeros = [
        np.array([0.0, -0.0, 0.0, -0.0]).astype(DTYPES[BF16]),
        np.array([0.0, 0.0, -0.0, -0.0]).astype(DTYPES[F32]),
    ]
    for out_code in ALL:
        compared(zeros, [BF16, F32], [1.0, 1.0], 1.0, out_code)
        compared(zeros, [BF16, F32], [-1.0, 1.0], -1.0, out_code)


def rounding():
    """Midpoints between numbers of the output, their neighbours, and what is too large."""
    for code in ALL:
        if code != F64:
            points = boundaries(code, np.random.default_rng(0))
            answer = compared([points], [F64], [1.0], 1.0, code)
            assert answer.overflowed > 0


def places():
    """Sources at any byte, an output that is given, anywhere, and one that is a source."""
    rng = np.random.default_rng(3)
    for misalign in (1, 2, 3, 4, 8, 10, 13, 16):
        code = (F8_E5M2FNUZ, F32, F64, BF16)[misalign % 4]
        arrays = [normal(rng, code, 333) for _ in range(2)]
        compared(arrays, [code] * 2, [0.25, 0.5], 1.0, code, misalign=misalign)
    held, more = (torch.from_numpy(normal(rng, F32, 5000).view(np.uint8).copy()).to(DEVICE) for _ in range(2))
    arguments = ([F32] * 2, [1.0, 3.0], 4.0, 7, F32, [True, True])
    expected = [found.cpu() for found in torch_combine.combine([held, more], *arguments)]
    for offset in (0, 1, 4, 16):
        room = torch.zeros(20_032, dtype=torch.uint8, device=DEVICE)
        out = room[offset : offset + 20_000]
        found = triton_combine.combine([held, more], *arguments, out=out)
        assert found[0] is out
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
        assert not room[:offset].any()
        assert not room[offset + 20_000 :].any()
    found = triton_combine.combine([held, more], *arguments, out=held)
    assert found[0] is held
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
    assert all(one.device.type == torch.device(DEVICE).type for one in found)


def mixtures():
    """What the kernel does not take is left to torch, also where an output is given."""
    rng = np.random.default_rng(4)
    codes = [BF16, F32, F8_E4M3, F16, F64]
    compared([normal(rng, code, 100) for code in codes], codes, [1.0, 2.0, 3.0, 4.0, 5.0], 15.0, F32)
    sources = [torch.from_numpy(normal(rng, code, 8).view(np.uint8)).to(DEVICE) for code in codes]
    out = torch.empty(32, dtype=torch.uint8, device=DEVICE)
    found = triton_combine.combine(sources, codes, [1.0] * 5, 5.0, 0, F32, [False] * 5, out=out)
    assert found[0] is out
    assert torch.equal(out.cpu(), torch_combine.combine(sources, codes, [1.0] * 5, 5.0, 0, F32, [False] * 5)[0].cpu())


def contraction():
    """A product that is added without being rounded would be noticed."""
    rng = np.random.default_rng(5)
    arrays = [rng.standard_normal(600).astype(np.float32) for _ in range(2)]
    weights = [0.1, 0.7]
    answer = compared(arrays, [F32] * 2, weights, 1.0, F64)
    fused = [
        float(Fraction(float(a) * weights[0]) + Fraction(float(b)) * Fraction(weights[1]))
        for a, b in zip(*arrays, strict=True)
    ]
    assert (answer.out.view(np.float64) != np.array(fused)).sum() > 100


def gram():
    """Inner products have the bits of plain torch, centred or not, whatever the dtype and the last block."""
    rng = np.random.default_rng(6)
    for code in ALL:
        for elements, n, centre in ((700 + code, 3, None), (BLOCK, 2, code % 2), (BLOCK + 1, 3, 2)):
            arrays = [normal(rng, code, elements) for _ in range(n)]
            arrays[0][5] = np.inf
            raws = [torch.from_numpy(array.view(np.uint8)) for array in arrays]
            rows = torch.stack([torch_combine.widen(raw, code) for raw in raws])
            judge = torch_measuring.gram(rows, centre).numpy()
            found = triton_measuring.gram([raw.to(DEVICE) for raw in raws], [code] * n, centre).cpu().numpy()
            np.testing.assert_array_equal(np.isnan(found), np.isnan(judge))
            np.testing.assert_array_equal(np.nan_to_num(found).view(np.int64), np.nan_to_num(judge).view(np.int64))
    raws = [torch.from_numpy(normal(rng, code, 50).view(np.uint8)) for code in (BF16, F32)]
    rows = torch.stack([torch_combine.widen(raw, code) for raw, code in zip(raws, (BF16, F32), strict=True)])
    found = triton_measuring.gram([raw.to(DEVICE) for raw in raws], [BF16, F32], None).cpu()
    assert torch.equal(found, torch_measuring.gram(rows, None))


def memory():
    """A fold in place that runs out of memory has changed nothing, wherever it does: it can be done again."""
    tensor, real = torch.Tensor, {name: getattr(torch, name) for name in ("zeros", "empty", "from_numpy")}
    real |= {f"Tensor.{name}": getattr(tensor, name) for name in ("sum", "clone", "to", "new_empty", "new_zeros")}

    def failing(left, function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("pretended")
            return function(*arguments, **options)

        return call

    for number in range(1, 12):
        total = torch.ones(BLOCK, dtype=torch.float64, device=DEVICE).view(torch.uint8)
        more = torch.full((BLOCK,), 2.0, device=DEVICE).view(torch.uint8)
        left, failed = [number], 0
        for name, function in real.items():
            setattr(tensor if "." in name else torch, name.removeprefix("Tensor."), failing(left, function))
        try:
            for _ in range(2):
                try:
                    triton_combine.combine([total, more], [F64, F32], [1.0, 1.0], 1.0, 0, F64, [False, True], out=total)
                    break
                except torch.OutOfMemoryError:
                    failed += 1
        finally:
            for name, function in real.items():
                setattr(tensor if "." in name else torch, name.removeprefix("Tensor."), function)
        assert (total.view(torch.float64) == 3.0).all(), number
        if number == 1:
            assert failed


def soup():
    """The engine's tiles go through the kernel, from several threads, and in groups that carry a partial sum."""
    from factory import realistic, same_bits, write_checkpoint
    from simmer import simmer

    shapes = {"a.weight": (130, 41), "b.weight": (3, 5), "b.bias": (2048,)}
    calls, combine = [], triton_combine.combine

    def counting(sources, codes, *rest, **options):
        calls.append(codes)
        return combine(sources, codes, *rest, **options)

    triton_combine.combine = counting
    device, weights = "torch:cpu" if DEVICE == "cpu" else DEVICE, [1.0 + 0.1 * i for i in range(7)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_checkpoint(Path(folder) / f"r{i}", realistic(i, shapes)) for i in range(7)]
        judge, expected = simmer(paths, weights)
        assert not calls
        for group in (7, 3):
            made, found = simmer(paths, weights, device=device, group=group, workers=2, tile_blocks=2)
            assert same_bits(made, judge)
            assert found.digests.tolist() == expected.digests.tolist()
    assert [BF16] * 7 in calls
    assert [F64] + [BF16] * 3 in calls


def main() -> None:
    assert triton_combine.is_available(torch.device(DEVICE))
    # Numbers of every kind are cast here, and the interpreter computes with numpy.
    warnings.simplefilter("ignore")
    for check in sys.argv[2:]:
        with np.errstate(all="ignore"):
            globals()[check]()
        print(check)


if __name__ == "__main__":
    main()
