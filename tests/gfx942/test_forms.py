"""Every instruction form in any of our code objects, HIP's and Triton's, executed on random states and held against the
manual's pseudo-code: all registers, masks, LDS, memory and the program counter, with all lanes on and with some off.

Forms are taken from the code objects as they are, so a new one is tested as soon as a compiler emits it, and fails
where there is no model of it. Matrix instructions are held to AMD's register maps in test_matrices.py.
"""

import functools
import re
import zlib

import census
import numpy as np
import pytest
from assembled import assemble
from formats import BF16, F32
from models import ULPS, Model
from test_matrices import MATRICES, MIXED
from tinygrad.renderer.amd import decode_inst
from world import Trial, World

from wave64.backends import hip
from wave64.testing.emulator import code_object, core
from wave64.testing.emulator.decode import decode
from wave64.testing.emulator.lower import lower

ARCHS = ("gfx942", "gfx950")
#: what the emulator refuses with lanes off, for the manual does not say what happens
ALL_LANES = ("ds_read_b64_tr", "ds_read_b96_tr", "v_permlane16_swap_b32", "v_permlane32_swap_b32")
GROUPS = {"scalar": r"s_", "compare": r"v_cmp", "convert": r"v_cvt", "packed": r"v_(pk|mad_mix)", "lds": r"ds_",
          "memory": r"(global|flat|buffer|scratch)_", "matrix": r"v_mfma", "vector": r"v_"}
#: what the core leaves to NumPy
LEFT = re.compile(r"\w+_atomic_|ds_(add|cmpst)_|ds_read_b96_tr_|v_cvt_scalef32_|s_(setreg|store|atomic)_")
CLOCK = "s_memrealtime"  # which test_instructions.py looks at: its result comes of no operand
Forms = dict[str, dict[str, str]]


@pytest.fixture(scope="session")
def forms(reports) -> Forms:
    """arch -> {form: an instruction of it}; gfx950: those that gfx942 has not, and those with 8-bit floats, which
    differ."""
    found = {}
    for arch in ARCHS:
        found[arch] = dict(pair for each in reversed(reports[arch]["forms"].values()) for pair in sorted(each.items()))
    found["gfx950"] = {form: code for form, code in found["gfx950"].items()
                       if form not in found["gfx942"] or re.match(r"v_cvt\w*fp8|v_mfma", form)}
    return found


def group_of(form: str) -> str:
    return next(name for name, pattern in GROUPS.items() if re.match(pattern, form))


def _comparable(words: np.ndarray, trial: Trial) -> np.ndarray:
    """NaNs made one where the result is floating point, for which NaN an operation gives is not defined; and signs of
    those that OCP's 8-bit format has."""
    words, kind = words.copy(), trial.kind("vdst") if trial.instruction.family.startswith("VOP") else ""
    if kind == "f":
        words[(words & 0x7FFFFFFF) > 0x7F800000] = F32.nan
    elif kind in ("h", "p"):
        halves = words.view(np.uint16)
        halves[(halves & 0x7FFF) > 0x7C00] = 0x7E00
    elif "bf16" in trial.instruction.name:
        halves = words.view(np.uint16)
        halves[(halves & 0x7FFF) > 0x7F80] = BF16.nan
    elif re.match(r"v_cvt\w*fp8_f32", trial.instruction.name) and trial.arch == "gfx950":
        octets = words.view(np.uint8)
        octets[octets == 0xFF] = 0x7F
    if trial.instruction.name in ULPS:
        to = words[trial.instruction.number("vdst")]
        to[to & 0x7F800000 == 0] &= 0x80000000
    return words


def differences(trial: Trial, want: World) -> list[str]:
    got, found = trial.emulated, []
    vectors = [_comparable(world.v, trial).astype(np.int64) for world in (got, want)]
    off = np.abs(vectors[0] - vectors[1]) > ULPS.get(trial.instruction.name, 0)
    for name, wrong, one, other in (("v", off, got.v, want.v), ("s", got.s != want.s, got.s, want.s),
                                    ("SCC", got.scc != want.scc, got.scc, want.scc),
                                    ("LDS", got.lds != want.lds, got.lds, want.lds),
                                    ("memory", got.memory != want.memory, got.memory, want.memory)):
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            found.append(f"{name}{list(at)} is {int(one[at]):x}, not {int(other[at]):x}; {int(wrong.sum())} such")
    if got.pc != want.pc:
        found.append(f"goes on at {got.pc}, not {want.pc}")
    if unnoted := trial.unnoted():
        found.append(f"writes {', '.join(unnoted)}, which no check gets")
    return found


def differences_of_the_core(trial: Trial, form: str) -> list[str]:
    """How the core's execution differs from NumPy's, in any bit but those of a NaN; and what it tells the checks."""
    low, binding = lower(trial.instruction, trial.kernel, trial.arch), trial.binding
    by_numpy, by_core = trial.emulated, trial.by_core()
    if bool(LEFT.match(form)) != (by_core is None):
        return [f"the core {'leaves it to NumPy' if by_core is None else 'executes it'}"]
    if by_core is None:
        return []
    trial.emulated = by_core
    found = differences(trial, by_numpy)
    trial.emulated = by_numpy
    if (low.reads, low.writes) != (binding.reads, binding.writes):
        found.append(f"reads {low.reads} and writes {low.writes}, not {binding.reads} and {binding.writes}")
    return [f"the core: {each}" for each in found]


def check(form: str, code: str, arch: str) -> list[str]:
    found = []
    for i in range(8 if form.startswith("s_") else 2):  # a scalar instruction has one result a wave, others one a lane
        part = bool(i % 2)
        if part and form.startswith(ALL_LANES):
            continue
        try:
            trial = Trial(bytes.fromhex(code), arch, zlib.crc32(f"{form} {i}".encode()), part)
            wrong = differences(trial, Model(trial).world())
            if i < 2 and core.unfit() is None:
                wrong += differences_of_the_core(trial, form)
        except NotImplementedError as e:
            wrong = [str(e)]
        found += [f"{trial.instruction.text}, {'some' if part else 'all'} lanes on: {text}" for text in wrong]
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("group", [group for group in GROUPS if group != "matrix"])
def test_every_form_does_what_the_manual_says(group, arch, forms, record_property):
    chosen = {form: code for form, code in forms[arch].items()
              if group_of(form) == group and not form.startswith(CLOCK)}
    found = {form: wrong for form, code in chosen.items() if (wrong := check(form, code, arch))}
    assert found == {}
    record_property("forms", len(chosen))


@pytest.mark.parametrize("text", ["ds_read_b64_tr_b16 v[8:9], v1 offset:40", "ds_read_b64_tr_b8 v[8:9], v1",
                                  "ds_read_b96_tr_b6 v[8:10], v1", "ds_read_b64_tr_b4 v[8:9], v1 offset:8"])
def test_transposing_loads(text):
    """All of them, whether or not a compiler emits them."""
    loaded = code_object.load(assemble("gfx950", (("loads", text),)).read_bytes())
    code = loaded.image[slice(*loaded.text)][:8].tobytes()
    assert check(text, code.hex(), "gfx950") == []


PACKED = ("v_pk_max_f16 {}, {}, {}", "v_pk_fma_f16 {}, {}, {}, v14", "v_pk_add_u16 {}, {}, {}",
          "v_pk_max_i16 {}, {}, {}")
CONSTANTS = ("0", "-16", "1.0", "0.15915494")
SELECTED = ("", " op_sel:[0,1] op_sel_hi:[1,0]")


@functools.cache
def _constants() -> dict[str, str]:
    """Packed instructions with every kind of inline constant, either half of it for either result: text -> code."""
    texts = []
    for text in PACKED:
        for constant in CONSTANTS:
            for select in SELECTED:
                third = select.replace("]", ",1]" if "hi" in select else ",0]") if text.count(",") == 3 else select
                texts.append(text.format("v8", "v12", constant) + third)
    loaded = code_object.load(assemble("gfx942", (("packed", "\n".join(texts)),)).read_bytes())
    start, code = loaded.kernels["packed"].entry - loaded.text[0], loaded.image[slice(*loaded.text)]
    return {text: code[start + 8 * i:start + 8 * i + 8].tobytes().hex() for i, text in enumerate(texts)}


@pytest.mark.parametrize("text", PACKED)
def test_packed_instructions_take_inline_constants(text):
    """Plain `tl.maximum(x, 0)` becomes v_pk_max_f16 v, v, 0, whose high result asks for the constant's high half."""
    name = text.split()[0]
    chosen = {each: code for each, code in _constants().items() if each.split()[0] == name}
    assert len(chosen) == len(CONSTANTS) * len(SELECTED)
    for each, code in chosen.items():
        trial = Trial(bytes.fromhex(code), "gfx942", zlib.crc32(each.encode()), part=False)
        assert differences(trial, Model(trial).world()) == [], each


@pytest.mark.parametrize("arch", ARCHS)
def test_every_matrix_form_is_held_to_the_register_maps(arch, forms):
    tested = {name for name, _ in MATRICES} | set(MIXED.values())
    for form in (form for form in forms[arch] if group_of(form) == "matrix"):
        assert form.split()[0] in tested
        assert "f8f6f4" in form or not re.search("cbsz|abid|blgp", form), form


@pytest.mark.parametrize("arch", ARCHS)
def test_the_census_finds_every_instruction(arch):
    """Its quick walk against the decoder's, on the largest code object in the package."""
    if not hip.code_objects().get(arch):
        pytest.skip(f"the package was built without {arch} code objects")
    code = max((hip.code_object(arch, op) for op in hip.code_objects()[arch]), key=len)
    loaded = code_object.load(code)
    text = loaded.image[slice(*loaded.text)]
    starts, found, at = [], set(), 0
    while at < len(text):
        instruction = decode(text[at:at + 16].tobytes())
        starts.append(at // 4)
        form = census.form(instruction)
        if form not in found:  # the decoder itself, each time
            decoded = decode_inst(text[at:at + 8].tobytes(), "cdna")
            assert type(decoded).__name__.removesuffix("_LIT") == instruction.family
            assert instruction.words == decoded.size() // 4
            for name, _ in decoded._fields:
                got, want = getattr(instruction.fields, name), getattr(decoded, name)
                assert getattr(got, "offset", got) == getattr(want, "offset", want), (form, name)
        found.add(form)
        at += 4 * instruction.words
    walked = census.walk(text.view(np.uint32))[0].tolist()
    assert sorted(set(walked) ^ set(starts))[:3] == []
    assert set(census.forms({"largest": code})) ^ found == set()
