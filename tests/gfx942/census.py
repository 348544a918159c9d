"""Which instruction forms occur in our code objects: those that the package ships and those that Triton compiles.

    python tests/gfx942/census.py gfx942 hip        # JSON: form -> an instruction of that form, as hexadecimal bytes
    python tests/gfx942/census.py gfx942 rms_norm   # of the operator's Triton kernels

A form is a mnemonic, its encoding, the modifiers that are set, and of each source whether it is a vector register, a
scalar one, an inline constant or a literal. Needs a process without TRITON_INTERPRET.
"""

import json
import sys
from collections.abc import Iterator

import numpy as np

from wave64.testing.emulator import code_object
from wave64.testing.emulator.decode import Instruction, decode

#: fields of the decoder that are no register and change what an instruction does; of the rest the value matters little
MODIFIERS = ("neg", "abs", "opsel", "opsel_hi", "opsel_hi2", "neg_hi", "omod", "clmp", "src0_sel", "src1_sel",
             "src0_sext", "src1_sext", "src0_neg", "src1_neg", "src0_abs", "src1_abs", "dst_sel", "dst_unused",
             "dpp", "bc", "row_mask", "bank_mask", "cbsz", "abid", "blgp", "acc", "acc_cd", "sc0", "offen", "idxen",
             "lds", "sve", "s0", "s1", "sd")
SOURCES = ("src0", "src1", "src2", "ssrc0", "ssrc1", "saddr", "soffset")


def form(instruction: Instruction) -> str:
    decoded = instruction.fields._decoded
    words = [instruction.name, instruction.family]
    for name, _ in decoded._fields:
        value = getattr(decoded, name)
        if name in MODIFIERS and value:
            words.append(f"{name}={value}")
        elif name in SOURCES:
            words.append(f"{name}:{_kind(value.offset)}")
    return " ".join(words)


def _kind(code: int) -> str:
    if code >= 256:
        return "v"
    return "literal" if code == 255 else "constant" if 128 <= code <= 248 else "s" if code < 106 else str(code)


# ---- a quick walk: lengths and opcodes of every dword at once, from the manual's table of encodings

def _reduced(source: np.ndarray) -> np.ndarray:
    """Source operands, registers and constants of a kind made equal."""
    got = np.where(source >= 256, 256, source)
    got = np.where(got < 106, 0, got)
    got = np.where((got >= 128) & (got <= 208), 128, got)
    return np.where((got >= 240) & (got <= 248), 240, got)


#: (shift, value above it, kept bits of the first dword, of the second, sources as (dword, shift, width), dwords);
#: the first that fits counts
ENCODINGS = (
    (23, 0x17D, 0xFF80FF00, 0, ((0, 0, 8),), 1),                                      # SOP1
    (23, 0x17E, 0xFFFF0000, 0, ((0, 0, 8), (0, 8, 8)), 1),                            # SOPC
    (23, 0x17F, 0xFFFF0000, 0, (), 1),                                                # SOPP
    (28, 0xB, 0xFF800000, 0, (), 1),                                                  # SOPK
    (30, 0x2, 0xFF800000, 0, ((0, 0, 8), (0, 8, 8)), 1),                              # SOP2
    (25, 0x3F, 0xFE01FE00, 0, ((0, 0, 9),), 1),                                       # VOP1
    (25, 0x3E, 0xFFFE0000, 0, ((0, 0, 9),), 1),                                       # VOPC
    (31, 0x0, 0xFE000000, 0, ((0, 0, 9),), 1),                                        # VOP2
    (23, 0x1A7, 0xFFFFFF00, 0xF8000000, ((1, 0, 9), (1, 9, 9), (1, 18, 9)), 2),       # VOP3P
    (26, 0x34, 0xFFFFFF00, 0xF8000000, ((1, 0, 9), (1, 9, 9), (1, 18, 9)), 2),        # VOP3
    (26, 0x36, 0xFFFF0000, 0, (), 2),                                                 # DS
    (26, 0x37, 0xFFFFE000, 0x00FF0000, (), 2),                                        # FLAT, GLOBAL, SCRATCH
    (26, 0x38, 0xFFFFF000, 0x00800000, ((1, 24, 8),), 2),                             # MUBUF
    (26, 0x30, 0xFFFFE000, 0, (), 2),                                                 # SMEM
)
#: odd numbers that keep apart what a key is summed from
MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB, 0x2545F4914F6CDD1D, 0x51ED270B9F5E2A3D)
LITERAL, SDWA, DPP, MFMA_SCALE = 255, 249, 250, 0xD3AC
LITERAL_ALWAYS = ((0xFE000000, 0x2E000000), (0xFE000000, 0x30000000), (0xFF800000, 0xBA000000))  # fmamk, fmaak, setreg


def walk(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where instructions start, a number each that those of a form share), of the dwords of an executable segment."""
    first, second = text.astype(np.int64), np.append(text[1:], 0).astype(np.int64)
    words, key = np.zeros(len(text), np.int64), np.zeros(len(text), np.int64)
    for shift, value, keep_first, keep_second, sources, length in ENCODINGS:
        here = (words == 0) & (first >> shift == value)
        one, other = first[here], second[here]
        got = (one & keep_first) * MIX[0] + (other & keep_second) * MIX[1]  # in 64 bits that wrap
        size = np.full(len(one), length)
        for i, (dword, at, width) in enumerate(sources):
            source = (other if dword else one) >> at & (1 << width) - 1
            got += _reduced(source) * MIX[2 + i]
            if not dword:
                size += (source == LITERAL).astype(int)
                if value in (0x3F, 0x3E, 0x0):
                    size += np.isin(source, (SDWA, DPP)).astype(int)
                    modifier = other & np.where(value == 0x3E, 0xFFFF8000, 0xFFFFFF00)
                    got += np.where(np.isin(source, (SDWA, DPP)), modifier * MIX[1], 0)
        for mask, fixed in LITERAL_ALWAYS:
            size[(one & mask) == fixed] = 2
        size[one >> 16 == MFMA_SCALE] = 4
        words[here], key[here] = size, got
    if (words == 0).any():
        words[words == 0] = 1  # data, or an encoding that is none of these: the decoder says so where one starts there
    lengths, starts, at = words.tolist(), [], 0
    while at < len(lengths):
        starts.append(at)
        at += lengths[at]
    return np.array(starts), key[starts]


def forms(codes: dict[str, bytes]) -> dict[str, str]:
    """form -> an instruction of that form, as hexadecimal bytes, of code objects by name."""
    seen: set[int] = set()
    found: dict[str, str] = {}
    for code in codes.values():
        loaded = code_object.load(code)
        text = loaded.image[slice(*loaded.text)]
        starts, keys = walk(text.view(np.uint32))
        for key, at in zip(*np.unique(keys, return_index=True), strict=True):
            if int(key) not in seen:
                seen.add(int(key))
                offset = int(starts[at]) * 4
                instruction = decode(text[offset:offset + 16].tobytes())
                found.setdefault(form(instruction), text[offset:offset + 4 * instruction.words].tobytes().hex())
    return dict(sorted(found.items()))


def code_objects(arch: str, of: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the code objects that ship, or of those that Triton makes for an operator's cases."""
    from wave64 import OPS
    from wave64.backends import hip

    if of == "hip":
        yield from ((op, hip.code_object(arch, op)) for op in hip.code_objects().get(arch, ()))
        return
    from wave64.testing import compile

    for case in OPS[of].cases():
        for launch in compile.compile_case(OPS[of], case, arch):
            yield launch.kernel.hash, launch.kernel.asm["hsaco"]


if __name__ == "__main__":
    print(json.dumps({of: forms(dict(code_objects(sys.argv[1], of))) for of in sys.argv[2:]}))
