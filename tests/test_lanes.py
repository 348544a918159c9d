"""What runs HIP kernels on a CPU needs nothing of that CPU: it is compiled for the oldest of its kind, has what the
compiler calls there, and rounds as torch does."""

import ctypes
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from elftools.elf.elffile import ELFFile

from wave64.testing import lanes

#: everything that the compiler may call to convert, and to compute what an old CPU has no instruction for
PROBE = """
#if defined(__AVX__) || defined(__SSE4_1__)
#error compiled for a CPU that not everybody has
#endif
using bf16 = __bf16;
using fp16 = _Float16;
#define CONVERT(FROM, TO)                                                                                           \\
    extern "C" __attribute__((visibility("default"))) void FROM##_##TO(const FROM* x, TO* y, long n) {              \\
        for (long i = 0; i < n; i++) y[i] = TO(x[i]);                                                               \\
    }
CONVERT(float, bf16) CONVERT(double, bf16) CONVERT(int, bf16) CONVERT(bf16, float) CONVERT(bf16, double)
CONVERT(float, fp16) CONVERT(double, fp16) CONVERT(int, fp16) CONVERT(fp16, float) CONVERT(fp16, double)
extern "C" __attribute__((visibility("default"))) void sums(const bf16* a, const fp16* b, bf16* c, fp16* d, long n) {
    for (long i = 0; i < n; i++) c[i] = a[i] + a[n - 1 - i], d[i] = b[i] + b[n - 1 - i];
}
extern "C" __attribute__((visibility("default"))) void fused(const float* x, float* y, long n) {
    for (long i = 0; i < n; i++) y[i] = __builtin_fmaf(x[i], x[n - 1 - i], -x[n / 2]);
}
"""
TYPES = {"float": torch.float32, "double": torch.float64, "int": torch.int32, "bf16": torch.bfloat16,
         "fp16": torch.float16}


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    (folder / "probe.hip").write_text(PROBE)
    return lanes.build(folder / "probe.hip", "gfx942")


def converted(probe, source: str, to: str, values: torch.Tensor) -> torch.Tensor:
    got = torch.empty(values.shape, dtype=TYPES[to])
    getattr(probe, f"{source}_{to}")(*(ctypes.c_void_p(x.data_ptr()) for x in (values, got)),
                                     ctypes.c_long(len(values)))
    return got


def floats() -> torch.Tensor:
    """Of all sizes; midpoints of bf16 and of fp16, and their neighbors; what overflows, denormals, infinities, NaN."""
    random = np.random.default_rng(0)
    any_bits = random.integers(0, 2**32, 20_000, dtype=np.uint32)
    halves = np.concatenate([any_bits[:4000] & 0xFFFF0000 | 0x8000, any_bits[4000:8000] & 0xFFFFE000 | 0x1000])
    near = np.concatenate([halves, halves - 1, halves + 1])
    small = (random.standard_normal(4000) * 2.0 ** random.integers(-28, 18, 4000)).astype(np.float32)
    awkward = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 3.39e38, 3.4e38, 1e-40, 6e-8,
                        2.9e-8, 2.98e-8], np.float32)
    return torch.from_numpy(np.concatenate([any_bits, near, small.view(np.uint32), awkward.view(np.uint32)])
                            .view(np.float32))


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert (torch.signbit(got) == torch.signbit(want))[~torch.isnan(want)].all()


@pytest.mark.parametrize("small", ["bf16", "fp16"])
def test_conversions_round_once_to_nearest(probe, small):
    values = floats()
    same(converted(probe, "float", small, values), values.to(TYPES[small]))
    all_of_them = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(TYPES[small])
    for wide in ("float", "double"):
        same(converted(probe, small, wide, all_of_them), all_of_them.to(TYPES[wide]))
    integers = torch.cat([torch.arange(-70000, 70000, 7), torch.tensor([2**31 - 1, -2**31])]).int()
    same(converted(probe, "int", small, integers), integers.double().to(TYPES[small]))


@pytest.mark.parametrize(("small", "bits"), [("bf16", 8), ("fp16", 11)])
def test_a_double_is_rounded_once(probe, small, bits):
    """Next to midpoints by less than fp32 can tell: by way of it the ties would go to even."""
    random = np.random.default_rng(1)
    whole = random.integers(2 ** (bits - 1), 2**bits, 2000)
    offset = random.choice([-1, 0, 1], 2000) * 2.0**-40
    values = torch.from_numpy((whole + 0.5 + offset) * random.choice([-1.0, 1.0], 2000))
    want = torch.tensor([float(round(Fraction(float(x)))) for x in values], dtype=torch.float64).to(TYPES[small])
    same(converted(probe, "double", small, values), want)
    same(converted(probe, "double", small, floats().double()), floats().to(TYPES[small]))
    huge = torch.tensor([1e300, -1e300], dtype=torch.float64)
    assert converted(probe, "double", small, huge).tolist() == [np.inf, -np.inf]


def test_sums_and_fused_products(probe):
    values = floats()
    values = values[torch.isfinite(values)]
    sums = [torch.empty(len(values), dtype=TYPES[small]) for small in ("bf16", "fp16")]
    given = [values.to(TYPES[small]) for small in ("bf16", "fp16")]
    probe.sums(*(ctypes.c_void_p(x.data_ptr()) for x in (*given, *sums)), ctypes.c_long(len(values)))
    for x, got in zip(given, sums, strict=True):
        same(got, x + x.flip(0))
    numbers, fused = torch.randn(1001), torch.empty(1001)
    probe.fused(*(ctypes.c_void_p(x.data_ptr()) for x in (numbers, fused)), ctypes.c_long(1001))
    exact = [Fraction(float(a)) * Fraction(float(b)) - Fraction(float(numbers[500]))
             for a, b in zip(numbers, numbers.flip(0), strict=True)]
    same(fused, torch.tensor([float(x) for x in exact]))


def test_what_is_built_needs_the_c_library_alone(probe):
    with open(probe._name, "rb") as file:
        table: Any = ELFFile(file).get_section_by_name(".dynsym")
        needed = {symbol.name for symbol in table.iter_symbols()
                  if symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"}
    libraries = [ctypes.CDLL("libc.so.6"), ctypes.CDLL("libm.so.6")]
    assert [name for name in needed if not any(hasattr(library, name) for library in libraries)] == []


def test_what_nobody_has_is_refused_when_it_is_built(tmp_path):
    source = tmp_path / "caller.hip"
    source.write_text('extern "C" int nobody_has_it();\n'
                      'extern "C" __attribute__((visibility("default"))) int calls() { return nobody_has_it(); }\n')
    with pytest.raises(RuntimeError, match=r"caller: [\s\S]*undefined symbol: nobody_has_it"):
        lanes.build(source, "gfx942")
