"""Two public reports of wrong decodes on gfx942, with the kernels that they name: AITER's issues 4363 and 5679.

Each piece of work is executed four ways: as hardware does where memory answers at once, with what loads bring arriving
as late as s_waitcnt allows (`Late`), held to the bytes of its buffers, and held to the waits that the manual asks for.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from aiter_attention import LATENT, VALUES, softmax
from aiter_objects import Objects
from aiter_work import BEYOND, Arrays, Launch, bf16, fp8, in_turn, prepared_by, slots, wide

from wave64.testing.emulator import checks
from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.run import execute
from wave64.testing.emulator.watch import SCALAR, Check, registers

SCALE = 192**-0.5


class Late(Check):
    """Registers get what loads of vector memory bring when an s_waitcnt says that it has come, and not before."""

    def start(self) -> None:
        self.issued = np.zeros(self.machine.count, np.int64)  # by wave
        #: waves, registers, what they get, and how many the waves had issued with it
        self.flying: list[tuple[np.ndarray, list[int], list[np.ndarray], np.ndarray]] = []

    def wrap(self, b: Binding, run: Callable) -> Callable:
        waves, vgprs = b.party.numbers.copy(), self.machine.vgprs
        if b.instruction.name == "s_waitcnt":
            bits = b.fields.simm16
            return functools.partial(self._wait, run, waves, bits & 15 | bits >> 10 & 0x30)
        if b.instruction.family not in ("GLOBAL", "FLAT", "MUBUF", "SCRATCH"):
            return run
        brought = [register for register in registers(b.writes) if register < SCALAR]

        def launched() -> object:
            before = [vgprs[register, waves].copy() for register in brought]
            outcome = run()
            after = [vgprs[register, waves].copy() for register in brought]
            for register, values in zip(brought, before, strict=True):
                vgprs[register, waves] = values
            self.issued[waves] += 1
            if brought:
                self.flying.append((waves, brought, after, self.issued[waves]))
            return outcome
        return launched

    def _wait(self, run: Callable, waves: np.ndarray, left: int) -> object:
        outcome, flying = run(), []
        for of, brought, values, number in self.flying:
            come = np.isin(of, waves) & (self.issued[of] - number >= left)
            for register, value in zip(brought, values, strict=True):
                self.machine.vgprs[register, of[come]] = value[come]
            if not come.all():
                flying.append((of[~come], brought, [value[~come] for value in values], number[~come]))
        self.flying = flying
        return outcome


@dataclass
class Reported:
    """report: the issue's number. make: draws arguments and memory anew; the launch's error is the largest one."""

    report: int
    what: str
    object: str
    make: Callable[[], Launch]


def several_tokens(new: int, lens: list[int], splits: int, heads: int = 16) -> Launch:
    """Decode of `new` tokens a sequence, causal, in bf16, pages of one token, splits merged here."""
    random, mem, count = np.random.default_rng(0), Arrays(), len(lens)
    pages, ends = sum(lens) + 7, np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    q = mem.put("q", bf16(random.standard_normal((count * new, heads, LATENT))))
    kv = mem.put("kv", bf16(random.standard_normal((pages, 1, 1, LATENT)) * 0.5))
    indices = mem.put("kv_page_indices", random.permutation(pages)[:ends[-1]].astype(np.int32))
    kv_ends, qo_ends, split_ends = (mem.put(name, values) for name, values in (
        ("kv_indptr", ends), ("qo_indptr", np.arange(count + 1, dtype=np.int32) * new),
        ("num_kv_splits_indptr", np.arange(count + 1, dtype=np.int32) * splits)))
    last = mem.put("kv_last_page_lens", np.ones(count, np.int32))
    out = mem.new("splitData", (count * new, splits, heads, VALUES), np.float32, np.nan)
    lse = mem.new("splitLse", (count * new, splits, heads), np.float32, np.nan)
    args = slots(out, lse, q, kv, kv_ends, indices, last, SCALE, heads * new, splits, heads * LATENT * 2 * new,
                 LATENT * 2, 0, qo_ends, split_ends, None, None, None, 0)

    def error() -> float:
        keys, queries, worst = wide(kv).reshape(pages, LATENT)[indices], wide(q), 0.0
        for row in range(count * new):
            of, token = divmod(row, new)
            seen = keys[ends[of]:ends[of + 1] - new + 1 + token]
            weights = np.exp(lse[row].astype(np.float64) - lse[row].max(0))[..., None]
            got = (weights * out[row]).sum(0) / weights.sum(0)
            worst = max(worst, float(np.abs(got - softmax(queries[row] @ seen.T * SCALE) @ seen[:, :VALUES]).max()))
        return worst
    return Launch((-(-heads * new // 128), count, splits), 256, args, mem, error)


def persistent(heads: int, lens: list[int], page: int) -> Launch:
    """Decode of a token a sequence in FP8, by two workgroups that each take their list of sequences."""
    random, mem, count = np.random.default_rng(0), Arrays(), len(lens)
    used = [-(-length // page) for length in lens]
    ends, pages = np.concatenate([[0], np.cumsum(used)]).astype(np.int32), sum(used) + 7
    octets, queries = fp8(random.standard_normal((count, heads, LATENT)), "gfx942")
    q = mem.put("q", octets)
    octets, latents = fp8(random.standard_normal((pages, page, 1, LATENT)) * 0.5, "gfx942")
    kv, drawn = mem.put("kv", octets), random.permutation(pages)[:ends[-1]].astype(np.int32)
    indices, kv_ends = mem.put("kv_page_indices", drawn), mem.put("kv_indptr", ends)
    qo_ends = mem.put("qo_indptr", np.arange(count + 1, dtype=np.int32))
    in_last = np.array([length - (n - 1) * page for length, n in zip(lens, used, strict=True)], np.int32)
    last = mem.put("kv_last_page_lens", in_last)
    #: sequence, where its partial result goes (-1: it has none), its rows, its pages, keys behind these
    items = [(i, -1, i, i + 1, ends[i], ends[i + 1], 0, 0) for i in range(count)]
    work = mem.put("work_info", np.array(items, np.int32))
    whose = mem.put("work_indptr", np.array([0, count // 2, count], np.int32))
    meta = mem.put("work_meta_data", np.array([whose.ctypes.data, work.ctypes.data, *[0] * 8], np.uint64))
    partial = mem.new("splitData", (count, 1, heads, VALUES), np.float32, np.nan)
    lse = mem.new("splitLse", (count, 1, heads), np.float32, np.nan)
    out = mem.new("output", (count, heads, VALUES), np.uint16, 0x7FC0)
    q_scale, kv_scale = (mem.put(name, np.ones(1, np.float32)) for name in ("q_scale", "kv_scale"))
    args = slots(partial, lse, q, kv, kv_ends, indices, last, SCALE, heads, 1, heads * LATENT, LATENT * page,
                 page.bit_length() - 1, qo_ends, meta, out, q_scale, kv_scale, 1, None, None, 1, 0)

    def error() -> float:
        worst = 0.0
        for of, length in enumerate(lens):
            keys = latents[drawn[ends[of]:ends[of + 1]]].reshape(-1, LATENT)[:length]
            want = softmax(queries[of] @ keys.T * SCALE) @ keys[:, :VALUES]
            worst = max(worst, float(np.abs(wide(out[of]) - want).max()))
        return worst
    return Launch((2, 1, 1), 256, args, mem, error)


FOUR, EIGHT = "mla_a16w16_qh16_m16x4_n16x1_coex0_mask1", "mla_a16w16_qh16_m32x4_n16x1_coex0_mask1"
MANY = "mla_dec_stage1_bf16_a16w16_subQ128_mqa128"
QH16, QH64 = "mla_a8w8_qh16_qseqlen1_gqaratio16_ps", "mla_a8w8_qh64_qseqlen1_gqaratio64_v3_ps"
REPORTS = (
    Reported(5679, "16 heads, 8 new tokens", MANY, lambda: several_tokens(8, [200], 2)),
    Reported(5679, "16 heads, 8 new tokens", EIGHT, lambda: several_tokens(8, [512], 2)),
    Reported(5679, "16 heads, 8 new tokens, four sequences", EIGHT, lambda: several_tokens(8, [40, 9, 64, 130], 4)),
    Reported(5679, "16 heads, 2 new tokens, said to be right", FOUR, lambda: several_tokens(2, [512], 2)),
    Reported(4363, "64 heads, FP8, pages of 64", QH64, lambda: persistent(64, [512, 130], 64)),
    Reported(4363, "64 heads, FP8, pages of 1", QH64, lambda: persistent(64, [512, 130], 1)),
    Reported(4363, "16 heads, FP8, pages of 1, said to be right", QH16, lambda: persistent(16, [512, 130], 1)),
)
COLUMNS = ("report", "work", "object", "error: loads at once", "late", "beyond its buffers", "waits that are missing")


def row(each: Reported, code: bytes) -> list[str]:
    """Of the table: the largest error of a number, where loads come at once and late; what bounds and waits say."""
    def executed(check: tuple[type[Check], ...], beyond: int = BEYOND) -> str:
        launch = each.make()
        try:
            with prepared_by(code, launch) as recorded:
                if check == (checks.Waits,):
                    execute(recorded[0], launch.arrays.buffers(beyond), checks=check)
                    return "none"
                in_turn(recorded, launch.arrays.buffers(beyond), check)
            return f"{launch.error():.3f}"
        except EmulationError as e:
            at, instruction, says = re.match(r"\S+(\+\S+): (\w+).*?: ([a-z].*)", str(e)).groups()
            return re.sub(r" \(at 0x\w+\)| at 0x\w+,", "", f"{at} {instruction}: {says}")

    inside = executed((), beyond=0)
    return [str(each.report), each.what, each.object, executed(()), executed((Late,)),
            "nothing" if re.fullmatch(r"[\d.]+", inside) else inside, executed((checks.Waits,))]


def rows(objects: Objects) -> Iterator[list[str]]:
    for each in REPORTS:
        name = f"gfx942/mla/{each.object}.co"
        why = objects.lacks(name)
        yield [str(each.report), each.what, each.object, why, "", "", ""] if why else row(each, objects.read(name))
