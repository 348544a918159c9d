"""The capability table: what each GPU architecture is. Standard library only.

Read by the build (`python arch.py --hip-targets`), by dispatch, by the kernels' launchers and by the tests.
Figures are AMD's: the instruction set manuals (CDNA2 to CDNA4, RDNA3 to RDNA4) for wave size, LDS of a workgroup,
matrix cores and their FP8; "GPU hardware specifications" in ROCm's documentation for compute units; the product pages
for rates. What AMD has not published is 0.
"""

import argparse
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Arch:
    name: str                 # as the compiler spells it: gfx942, sm_90
    wave_size: int            # lanes that run in step
    lds_bytes: int            # on-chip memory one block may use
    matrix: str | None        # "mfma", "wmma", "wgmma" or None
    fp8: str | None           # the flavor the matrix cores take: "e4m3fnuz", "e4m3fn" or None
    compute_units: int = 0    # of the product named below; 0 where a table figure would mislead
    xcds: int = 1             # chiplets that blocks are assigned to round robin, each with an L2
    bandwidth_gbs: int = 0    # peak device memory bandwidth, GB/s
    bf16_tflops: float = 0.0  # dense matrix peak
    fp8_tflops: float = 0.0
    product: str = ""         # whose figures these are
    code_objects: bool = True  # whether a wheel holds HIP's; without, Triton's and the reference serve

    @property
    def vendor(self) -> str:
        return "nvidia" if self.name.startswith("sm_") else "amd"


ARCHS = {
    a.name: a
    for a in (
        Arch("gfx90a", 64, 64 * 1024, "mfma", None, 104, 1, 1638, 191.5, 0.0, "MI250X, one die"),
        Arch("gfx942", 64, 64 * 1024, "mfma", "e4m3fnuz", 304, 8, 5300, 1307.4, 2614.9, "MI300X"),
        Arch("gfx950", 64, 160 * 1024, "mfma", "e4m3fn", 256, 8, 8000, 2500.0, 5000.0, "MI355X"),
        Arch("gfx1100", 32, 64 * 1024, "wmma", None, 96, 1, 960, 122.8, 0.0, "RX 7900 XTX"),
        Arch("gfx1151", 32, 64 * 1024, "wmma", None, 40, 1, 256, product="Radeon 8060S", code_objects=False),
        Arch("gfx1200", 32, 64 * 1024, "wmma", "e4m3fn", 32, 1, 320, 103.0, 205.0, "RX 9060 XT", code_objects=False),
        Arch("gfx1201", 32, 64 * 1024, "wmma", "e4m3fn", 64, 1, 640, 191.0, 383.0, "R9700"),
        Arch("gfx1250", 32, 320 * 1024, "wmma", "e4m3fn"),  # no product of it has published figures
        Arch("sm_90", 32, 227 * 1024, "wgmma", "e4m3fn", 132, 1, 4800, 989.0, 1979.0, "H200, development only"),
    )
}

#: Those that `wave64.emulate` and the server's --device have, executing their machine code on a CPU.
EMULATED = ("gfx942", "gfx950")

#: Architectures whose code objects a wheel holds.
HIP_TARGETS = tuple(name for name, a in ARCHS.items() if a.vendor == "amd" and a.code_objects)


def lookup(name: str) -> Arch:
    """The table's row for `name` (feature suffixes such as `:sramecc+` are ignored).

    An architecture without a row gets what its family guarantees, and neither matrix instructions nor FP8, so that it
    runs on the portable kernels rather than failing; `known` tells the two apart, and `warning` says so in words.
    """
    name = name.split(":")[0]
    if name in ARCHS:
        return ARCHS[name]
    if name.startswith("sm_"):
        return replace(ARCHS["sm_90"], name=name, lds_bytes=48 * 1024, matrix=None, fp8=None, compute_units=0,
                       bandwidth_gbs=0, bf16_tflops=0.0, fp8_tflops=0.0, product="", code_objects=False)
    wave_size = 64 if name.startswith("gfx9") else 32
    return Arch(name, wave_size, 64 * 1024, None, None, code_objects=False)


def warning(arch: Arch) -> str | None:
    """What a user of `arch` has to know: None for one whose code objects are in the wheel."""
    if not known(arch):
        return (f"{arch.name} is not in wave64's table (wave64/arch.py): portable kernels serve, without HIP's, matrix "
                "instructions that are known and FP8")
    if not arch.code_objects and arch.vendor == "amd":
        return f"{arch.name}: the wheel has no code objects for it: Triton's kernels and the reference serve"
    return None


def known(arch: Arch) -> bool:
    return arch.name in ARCHS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hip-targets", action="store_true", help="print the code object targets, separated by ';'")
    if parser.parse_args().hip_targets:
        print(";".join(HIP_TARGETS))
