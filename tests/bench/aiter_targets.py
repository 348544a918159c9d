"""Shapes of real models: how long AITER's assembly and our kernels are predicted to take on MI300X and MI355X.

    python tests/bench/aiter_targets.py --hsa amd_aiter-0.1.7.post2.dev18-py3-none-any.whl --write
    python tests/bench/aiter_targets.py --hsa WHEEL --arch gfx942 --only mla,experts --write   # these rows alone, anew
    python tests/bench/aiter_targets.py --plot tests/bench/aiter.png     # picture and AITER.md's table of what is kept

Both are counted on the emulator: of AITER's a workgroup, at two lengths of its loop; of ours a few workgroups of each
launch at its real size (testing/sampled.py). testing/predict.py makes times of the counts, with data that no cache has.
AITER's time is that of its fastest object for the shape, ours that of the backend which serves. `floor`: what the
products take were all matrix units busy at peak rates, or what memory takes at its peak rate, whichever is longer.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiter_attention
import numpy as np
import torch
from aiter_attention import LATENT, VALUES, _paged
from aiter_calibrate import counts_of, stored, work_of_blocks
from aiter_dense import _blocks
from aiter_moe import whole
from aiter_objects import VERSION, Objects
from aiter_reports import MANY, several_tokens
from aiter_work import in_processes, in_turn, prepared_by, with_table
from attention_predicted import KEYS, aiters, of_length
from attention_predicted import ours as our_attention

from wave64 import OPS, platform, quant
from wave64.arch import EMULATED, lookup
from wave64.testing import sampled
from wave64.testing.predict import CLOCK_GHZ, SIMDS, TIE, Work, predicted_us
from wave64.testing.sparse import empty

STORED = Path(__file__).with_name("targets.json")
CPU, BLOCK, BF16 = torch.device("cpu"), 128, torch.bfloat16
CACHED, SPARE = 4096, 3  # keys of a sequence that decodes; pages that no sequence has
EXECUTED, PROBED = 16, 1024  # workgroups of a launch of ours, and that are looked at for whether they have work
#: parts of kernels' names of the products of experts and what they end with; AITER's sorting and quantizing are others
EXPERTS = ("_up_", "gate_up", "_down_", "_sum_", "combine")


@dataclass(frozen=True)
class Row:
    """Times in microseconds. allowed: of ours over AITER's, the target. by: what ours needs longest."""

    arch: str
    family: str
    what: str
    theirs: float
    ours: float
    floor: float
    by: str
    backend: str
    allowed: float = 1.0

    @property
    def verdict(self) -> str:
        if self.ours <= self.allowed * self.theirs:
            return "reached"
        return f"tie: {self.by}" if self.ours <= TIE * self.allowed * self.theirs else f"missed: {self.by}"


#: (work, what counts its rows)
Piece = tuple[str, Callable[[], Iterable[Row]]]


def ours(op: str, args: dict, arch: str, **options: Any) -> tuple[str, list[sampled.Sample]]:
    """(the backend that serves, samples of its launches). options: of sampled.works."""
    with platform.target(arch):
        made = OPS[op].backends
        serves = next(name for name in ("hip", "triton") if name in made and not (
            made[name].supports and made[name].supports(**args)))
    return serves, sampled.works(OPS[op], serves, args, arch, EXECUTED, probes=PROBED, **options)


def row(arch: str, family: str, what: str, theirs: list[Work], served: tuple[str, list], once: float,
        allowed: float = 1.0) -> Row:
    backend, works = served[0], [each.work for each in served[1]]
    return Row(arch, family, what, total_us(theirs), total_us(works), floor_us(arch, [theirs, works], once),
               sampled.longest(works), backend, allowed)


def total_us(works: list[Work]) -> float:
    return sum(predicted_us(work, True) for work in works)


def floor_us(arch: str, each: list[list[Work]], once: float) -> float:
    """once: bytes that must cross. each: launches of those who did it, of whom the fewest matrix cycles count."""
    machine = lookup(arch)
    matrix = min(sum(work.blocks * work.cycles["matrix"] for work in works) for works in each)
    return max(once / (machine.bandwidth_gbs * 1e3),
               matrix / SIMDS / (machine.compute_units or 1) / CLOCK_GHZ[arch] / 1e3)


class Theirs:
    """AITER's objects, counted once each."""

    def __init__(self, objects: Objects, arch: str):
        self.objects, self.arch, self.units = objects, arch, lookup(arch).compute_units or 1
        self.counted: dict[str, dict] = {name: each for name, each in stored()[0].items() if name.startswith(arch)}

    def work(self, name: str, length: float, blocks: float, once: float, made: tuple | None = None) -> Work:
        if name not in self.counted:
            self.counted[name] = counts_of(name, self.objects.read(name), made)
        return work_of_blocks(self.arch, self.units, self.counted[name], length, blocks, once)


def fastest(works: Iterable[list[Work]]) -> list[Work]:
    return min(works, key=total_us)


# ---- products by blocks

def gemm(aiter: Theirs) -> Iterator[Piece]:
    for shape in ((64, 512, 1024), (16, 1536, 7168), (1024, 1536, 7168), (6144, 4608, 7168)):
        what = f"FP8 blocks {' x '.join(map(str, shape))}"
        yield what, functools.partial(_gemm, aiter, what, *shape)


def _gemm(aiter: Theirs, what: str, m: int, n: int, k: int) -> Iterator[Row]:
    arch = aiter.arch
    with platform.target(arch):
        dtype = quant.fp8_dtype()
    tiles = {name: tuple(map(int, name[:-3].split("_")[-1].split("x"))) for name in aiter.counted if "blockscale" in
             name and "fmoe" not in name}
    if arch == "gfx950":
        tiles = {f"gfx950/f8_block_scale_mi350_x{rows}.co": (rows, 256) for rows in (32, 128)}
    once = (m + n) * k + 2 * m * n
    theirs = fastest(
        [aiter.work(name, k, -(-m // rows) * -(-n // columns), once,
                    (functools.partial(_blocks, arch, (rows, columns), rows, columns), (512, 1024)))]
        for name, (rows, columns) in tiles.items())
    args = dict(a=empty((m, k), dtype, CPU), b=empty((n, k), dtype, CPU), a_scale=torch.ones(m, k // BLOCK),
                b_scale=torch.ones(n // BLOCK, k // BLOCK), block_shape=[BLOCK] * 2, out_dtype=BF16)
    yield row(arch, "gemm", what, theirs, ours("fp8_block_scaled_mm", args, arch), once)


# ---- DeepSeek-V3's experts on eight ranks

def moe(aiter: Theirs) -> Iterator[Piece]:
    for tokens in (1, 16, 64, 1024, 4096):
        what = f"FP8 experts, T={tokens}"
        yield what, functools.partial(_moe, aiter, what, tokens)


def _moe(aiter: Theirs, what: str, tokens: int) -> Iterator[Row]:
    experts, top_k, hidden, inter, arch = 256, 8, 7168, 256, aiter.arch
    with platform.target(arch):
        dtype = quant.fp8_dtype()
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(top_k)[1].int()
    of_each = np.bincount(ids.numpy().ravel(), minlength=experts)
    chosen, pairs = int((of_each > 0).sum()), tokens * top_k

    def blocks(rows: int) -> int:
        return int((-(-of_each // rows)).sum())

    args = dict(x=torch.zeros(tokens, hidden, dtype=BF16), w13=empty((experts, 2 * inter, hidden), dtype, CPU),
                w2=empty((experts, hidden, inter), dtype, CPU), topk_weights=torch.full((tokens, top_k), 0.125),
                topk_ids=ids, w13_scale=torch.ones(experts, 2 * inter // BLOCK, hidden // BLOCK),
                w2_scale=torch.ones(experts, hidden // BLOCK, inter // BLOCK), block_shape=[BLOCK] * 2)
    served = ours("fused_moe", args, arch, parts=EXPERTS)
    first = served[0], [each for each in served[1] if "_up_" in each.kernel]
    allowed = 1.0 if tokens <= 64 else 1.05
    once = chosen * 2 * inter * hidden + tokens * hidden + pairs * inter
    up = fastest([aiter.work(name, hidden, blocks(rows) * -(-inter // columns), once)]
                 for name in (name.replace("gfx942", arch) for name in stored()[0] if "fmoe_stage1" in name)
                 for rows, columns in [tile(name)])
    yield row(arch, "moe", f"{what}, gate and up", up, first, once, allowed)
    once = chosen * 3 * inter * hidden + 3 * tokens * hidden
    made = (lambda length: whole(arch, 32, length, inter, 1)), (512, 1024)
    name = f"{arch}/fmoe/silu/fmoe_bf16_blockscaleFp8_g1u1_vs_silu_1tg_32x256.co"
    yield row(arch, "moe", what, [aiter.work(name, hidden, blocks(32), once, made)], served, once, allowed)


def tile(name: str) -> tuple[int, int]:
    rows, columns = name.split("g1u1_")[1].split("_")[0].split("x")
    return int(rows), int(columns)


# ---- paged attention

def pa(aiter: Theirs) -> Iterator[Piece]:
    for heads, kv_heads in ((8, 1), (32, 8)):
        for num_seqs in (1, 32, 128):
            what = f"paged attention {heads}/{kv_heads}, B={num_seqs}, S={CACHED}"
            yield what, functools.partial(_pa, aiter, what, heads, kv_heads, num_seqs)


def _pa(aiter: Theirs, what: str, heads: int, kv_heads: int, num_seqs: int) -> Iterator[Row]:
    dim, page, arch = aiter_attention.DIM, aiter_attention.TOKENS, aiter.arch
    once = 4 * num_seqs * CACHED * kv_heads * dim
    pool = empty((2, num_seqs * CACHED // page + SPARE, page, kv_heads, dim), BF16, CPU)
    args = dict(query=torch.zeros(num_seqs, heads, dim, dtype=BF16), key_cache=pool[0], value_cache=pool[1],
                scale=dim**-0.5, **cached(num_seqs, page))
    theirs = aiter.work(f"{arch}/pa/pa_bf16_noquant_gqa8_1tg_4w.co", CACHED, num_seqs * kv_heads, once,
                        (_paged, (1024, 2048)))
    backend, (decode, *merge) = ours("paged_attention", args, arch, before=planned)
    yield row(arch, "pa", what, [theirs], (backend, [decode.of_bytes(once), *merge]), once)


def cached(num_seqs: int, page: int) -> dict[str, torch.Tensor]:
    """page_table and seq_lens of sequences of CACHED keys, whose pages lie anywhere."""
    order = torch.randperm(num_seqs * CACHED // page, generator=torch.Generator().manual_seed(0)).int()
    return dict(page_table=order.view(num_seqs, -1), seq_lens=torch.full((num_seqs,), CACHED, dtype=torch.int32))


def planned(launch: Any) -> None:
    """What the first sequence's plan is, all have: lengths are the same."""
    if "merge" in launch.kernel and (plan := launch.tensors.get("plan")) is not None:
        plan[:, 1] = plan[0, 1]
        plan[:, 0] = torch.arange(len(plan)) * plan[0, 1]


# ---- decode of multi-head latent attention

def mla(aiter: Theirs) -> Iterator[Piece]:
    for heads, num_seqs in ((16, 1), (16, 32), (16, 128), (128, 1), (128, 64)):
        what = f"MLA decode, {heads} heads, B={num_seqs}, S={CACHED}"
        yield what, functools.partial(_mla, aiter, what, heads, num_seqs)


def _mla(aiter: Theirs, what: str, heads: int, num_seqs: int) -> Iterator[Row]:
    page, arch, width = 64, aiter.arch, LATENT - VALUES
    cache = empty((num_seqs * CACHED // page + SPARE, page, LATENT), BF16, CPU)
    args = dict(q=torch.zeros(num_seqs, heads, LATENT, dtype=BF16), kv_cache=cache, kv_lora_rank=VALUES,
                scale=(128 + width)**-0.5, **cached(num_seqs, page))
    served = ours("mla_decode", args, arch, before=planned)
    once = 2 * num_seqs * (CACHED * LATENT + heads * (LATENT + VALUES))
    theirs = fastest(_latents(aiter, heads, num_seqs, splits) for splits in range(1, 17))
    yield row(arch, "mla", what, theirs, served, once)


def _latents(aiter: Theirs, heads: int, num_seqs: int, splits: int) -> list[Work]:
    """AITER's decode in so many splits, and of its merge, another kernel, the least that it can take: what it reads."""
    name, blocks = _object(aiter, heads), num_seqs * splits
    once = 2 * num_seqs * (CACHED + heads) * LATENT + 4 * blocks * heads * VALUES
    made = (lambda keys: several_tokens(1, [2 * keys], 2, heads)), (256, 512)
    decode = aiter.work(name, CACHED / splits, blocks, once, made)
    return [decode, replace(decode, blocks=num_seqs * heads, once=num_seqs * heads * VALUES * (4 * splits + 2), lines=0,
                            chain=1, cycles=dict.fromkeys(decode.cycles, 0))]


def _object(aiter: Theirs, heads: int) -> str:
    """Of so many heads; its result was right."""
    if heads == aiter_attention.HEADS:
        return next(aiter_attention.mla(aiter.arch, True)).object  # which aiter.py holds to fp64
    if (name := f"{aiter.arch}/mla/{MANY}.co") not in aiter.counted:
        launch = several_tokens(1, [512], 2, heads)
        with prepared_by(aiter.objects.read(name), launch) as recorded:
            in_turn(recorded, launch.arrays.buffers(0), ())
        assert launch.error() <= 5e-3, f"{name}: {launch.error():.2e} from fp64, 5e-3 allowed"
    return name


# ---- attention of as many queries as keys

def fmha(aiter: Theirs) -> Iterator[Piece]:
    for causal in (False, True):
        yield f"attention {'causal' if causal else 'of all keys'}", functools.partial(_fmha, aiter, causal)


def _fmha(aiter: Theirs, causal: bool) -> Iterator[Row]:
    heads, dims, arch = 32, (128, 128), aiter.arch
    theirs, mine = ([count(keys=keys, causal=causal) for keys in KEYS] for count in (
        functools.partial(aiters, aiter.objects, arch), functools.partial(our_attention, "hip", arch, dims=dims)))
    for length in (1024, 4096, 16384):
        work = [of_length(each, length, heads, dims, causal) for each in (theirs, mine)]
        theirs_us, ours_us = (predicted_us(each, True) for each in work)
        yield Row(arch, "fmha", f"attention {'causal, ' if causal else ''}S={length}", theirs_us, ours_us,
                  floor_us(arch, [[each] for each in work], work[0].once), sampled.longest(work[1:]), "hip", 1.05)


FAMILIES: dict[str, Callable[[Theirs], Iterator[Piece]]] = {"gemm": gemm, "moe": moe, "pa": pa, "mla": mla,
                                                            "fmha": fmha}


@functools.cache
def _theirs(hsa: Path | None, arch: str) -> Theirs:
    """A process's."""
    torch.set_num_threads(1)
    return Theirs(Objects(hsa, None), arch)


def count(task: tuple[Path | None, str, str, str]) -> tuple[list[Row], float]:
    """Rows of a piece of work, and the seconds that they took. task: where the objects are, architecture, family, and
    which of its pieces."""
    began, (hsa, arch, family, what) = time.monotonic(), task
    rows = list(dict(FAMILIES[family](_theirs(hsa, arch)))[what]())
    return rows, time.monotonic() - began


# ---- what comes of it

def rows_stored() -> list[Row]:
    return [Row(**each) for each in json.loads(STORED.read_text())["rows"]] if STORED.exists() else []


def write(rows: list[Row]) -> None:
    """Rows of the same architecture and work as before are replaced."""
    renewed = {(each.arch, each.what): each for each in rows}
    kept = [renewed.pop((each.arch, each.what), each) for each in rows_stored()]
    order = {key: i for i, key in enumerate((arch, family) for arch in EMULATED for family in FAMILIES)}
    lines = [json.dumps({name: round(value, 2) if isinstance(value, float) else value
                         for name, value in asdict(each).items()})
             for each in sorted([*kept, *renewed.values()], key=lambda each: order[each.arch, each.family])]
    STORED.write_text('{"rows": [\n' + ",\n".join(lines) + "\n]}\n")


def table(rows: list[Row]) -> str:
    lines = ["| predicted, us | floor | AITER | ours | ours / AITER | target | |", "|---|---:|---:|---:|---:|---:|---|"]
    lines += [f"| {lookup(each.arch).product}, {each.what} ({each.backend}) | {each.floor:.1f} | {each.theirs:.1f} | "
              f"{each.ours:.1f} | {each.ours / each.theirs:.2f} | {each.allowed:g} | {each.verdict} |" for each in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=EMULATED, action="append", help="default: both")
    parser.add_argument("--only", default="", metavar="TEXT[,TEXT]",
                        help="work with one of these in its words: blocks, experts, T=64, paged, mla, attention causal")
    parser.add_argument("--hsa", type=Path, help="the wheel, or its hsa folder; default: the installed wheel's")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {STORED.name}")
    parser.add_argument("--plot", type=Path, metavar="PNG",
                        help="draw what is kept, put it into AITER.md's table, and count nothing")
    options = parser.parse_args()
    if options.plot:
        from aiter_picture import draw

        draw(rows_stored(), options.plot)
        shown = STORED.with_name("AITER.md")
        shown.write_text(with_table(shown.read_text(), table(rows_stored()).splitlines()))
        print(table(rows_stored()))
        return 0
    try:
        objects = Objects(options.hsa, None)
        objects.verify()
    except (FileNotFoundError, ValueError) as e:
        parser.error(str(e))
    texts, began = options.only.lower().split(","), time.monotonic()
    tasks = [(options.hsa, arch, family, what) for arch in options.arch or EMULATED for family in FAMILIES
             for what, _ in FAMILIES[family](Theirs(objects, arch)) if any(text in what.lower() for text in texts)]
    print(f"amd-aiter {VERSION}\n", flush=True)
    print("\n".join(table([]).splitlines()))
    for (_, arch, _, what), (rows, seconds) in zip(tasks, in_processes(count, tasks, options.jobs), strict=True):
        print("\n".join(table(rows).splitlines()[2:]), flush=True)
        print(f"{arch} {what}: {seconds:.0f} s", file=sys.stderr, flush=True)
        if options.write:
            write(rows)
    print(f"{len(tasks)} pieces of work in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
