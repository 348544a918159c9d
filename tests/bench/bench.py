"""Speed of the operators next to their rooflines and, where there are any, other projects' kernels, in one run.

    python tests/bench/bench.py SUITE [--backend NAME ...] [--op NAME ...] [--case SUBSTRING] [--peers FOLDER]
                                [--json FILE] [--markdown]

Takes every large case of the suite's operators. Its result is compared with the reference evaluated in fp64, by the
contract's own rule, before it is timed, and the timed graph's result with that result, bit by bit: a wrong one has no
speed. Peers get the same arguments and are held to four times our bound. The columns:

    error, allowed  distance from the fp64 evaluation, relative; how far it may be
    checked         what the reference was evaluated in, and on how many key heads where the whole takes too long
    us              median of graph replays, each after the L2 cache was overwritten
    read us         the same, of a kernel that does nothing but read as many bytes as the call must move (floor.py)
    copy us         the same, of torch's copy of half as many bytes, which moves as many
    GB/s, read %    bytes that a call must move at least over its time; that over the read bandwidth measured here
    roof %          the larger of those bytes at that bandwidth and the operations at the rate of torch's bf16 matrix
                    product of 8192 x 8192, over the time: what is left to win
    TFLOP/s         operations that a call must do over its time
    vs ours         the row's time over that of our first row of the case: above 1 it is slower

The exit status is 1 if a result of ours was wrong or a kernel failed, 2 if there was nothing to run.
`--device cpu` takes the small cases and the wall clock; it is there to test this file (Triton: TRITON_INTERPRET=1).
"""

import argparse
import dataclasses
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import floor
import peers
import stages
import torch
import triton
from torch import Tensor

from wave64 import OPS, platform
from wave64.backends import probe
from wave64.op import BACKENDS, Case, Cost, Op
from wave64.testing import contract, timing

SUITES = {
    "attention": ("paged_attention", "prefill_attention", "varlen_attention", "mla_decode", "mla_decode_rope",
                  "merge_attn_states", "concat_and_cache_mla"),
    "moe": ("fused_moe", "grouped_topk", "topk_softmax", "moe_align_block_size", "per_token_group_quant_fp8",
            "silu_and_mul_per_token_group_quant_fp8", "per_token_quant_fp8", "per_tensor_quant_fp8",
            "fp8_block_scaled_mm", "fp8_scaled_mm"),
    "memory": ("rms_norm", "fused_add_rms_norm", "fused_add_rms_norm_quant_fp8", "silu_and_mul", "gelu_and_mul",
               "gelu_tanh_and_mul", "rotary_embedding", "reshape_and_cache", "concat_and_cache_mla",
               "concat_and_cache_mla_rope_fused",
               "transfer_kv", "merge_attn_states", "per_token_group_quant_fp8", "per_token_quant_fp8",
               "per_tensor_quant_fp8"),
    "sampling": ("sample", "apply_penalties", "apply_token_bitmask"),
}
#: Operations up to which the reference is evaluated on the whole of a case: about half a second in fp64 on an H200.
EXACT_FLOPS = 3e12
#: Operators whose heads are independent: the queries, and the arguments with key heads and their dimension.
HEADS = {
    "prefill_attention": ("query", {"key_cache": 2, "value_cache": 2}),
    "varlen_attention": ("q", {"k": 1, "v": 1}),
}
#: Arguments that have a row per token, where tokens are independent; and so many are evaluated in fp64.
TOKENS = {"fused_moe": ("x", "topk_weights", "topk_ids")}
EXACT_TOKENS = 64
#: Times our bound: a peer may round where our contract does not let us.
PEER_SLACK = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `speed` is None without one to report, and `note` says why."""

    op: str
    case: str
    kernel: str
    error: float | None = None
    allowed: float | None = None
    checked: str = ""
    speed: timing.Speed | None = None
    read_us: float | None = None
    copy_us: float | None = None
    ratio: float | None = None
    note: str = ""
    check_s: float = 0.0

    def cells(self) -> list[str]:
        if self.speed is None:
            return [self.op, self.case, self.kernel, self.note]
        s = self.speed
        error, allowed = ("" if x is None else f"{x:.1e}" for x in (self.error, self.allowed))
        return [self.op, self.case, self.kernel, error, allowed, self.checked,
                f"{s.us:.1f}", f"{self.read_us:.1f}", f"{self.copy_us:.1f}", f"{s.gbs:.0f}",
                f"{100 * s.read_share:.1f}", f"{100 * s.roofline_share:.1f}", f"{s.tflops:.1f}",
                "" if self.ratio is None else f"{self.ratio:.2f}"]


class Table:
    """Prints rows as they come, and keeps them in a file of JSON lines, so that a run cut short has lost nothing."""

    #: heading: width; negative: aligned left
    COLUMNS = {"op": -20, "case": -22, "kernel": -34, "error": 8, "allowed": 8, "checked": -17, "us": 9, "read us": 9,
               "copy us": 9, "GB/s": 7, "read %": 7, "roof %": 7, "TFLOP/s": 8, "vs ours": 8}

    def __init__(self, markdown: bool, file: str | None):
        self.markdown, self.rows = markdown, []
        self.file = open(file, "w", encoding="utf-8") if file else None  # noqa: SIM115 - open as long as the run lasts

    def begin(self, header: dict[str, Any]) -> None:
        text = (f"{header['device']}, torch {header['torch']}, Triton {header['triton']}, reads "
                f"{header['read_gbs']:.0f} GB/s, bf16 matrix product {header['matmul_tflops']:.1f} TFLOP/s, "
                f"an empty launch {header['launch_us']:.1f} us")
        print(f"`{header['command']}`\n{text}\n" if self.markdown else text, flush=True)
        self._write(header)
        self._print(list(self.COLUMNS))
        if self.markdown:
            print("|" + "|".join("---" if width < 0 else "---:" for width in self.COLUMNS.values()) + "|")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write({k: v for k, v in dataclasses.asdict(row).items() if v not in (None, "")})
        self._print(row.cells())

    def _print(self, cells: list[str]) -> None:
        if self.markdown:
            print("| " + " | ".join(cells + [""] * (len(self.COLUMNS) - len(cells))) + " |", flush=True)
            return
        widths = list(self.COLUMNS.values())
        padded = [c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(cells, widths, strict=False)]
        print("  ".join(padded).rstrip(), flush=True)

    def _write(self, content: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(content) + "\n")
            self.file.flush()


def reduced(op: Op, args: dict[str, Any], cost: Cost, limit: float) -> tuple[dict[str, Any], Callable, str]:
    """(arguments, pick, words): the part of a case that the reference is evaluated on, what takes that part of results,
    and what to call it. Everything, or as many key heads, evenly spread, as come to `limit` operations."""
    if op.name in TOKENS:
        return some_tokens(args, TOKENS[op.name])
    if op.name not in HEADS or cost.flops <= limit:
        return args, list, ""
    queries, keys = HEADS[op.name]
    first, dim = next(iter(keys.items()))
    heads = args[first].shape[dim]
    count = min(heads, max(2, int(heads * limit / cost.flops)))
    kept = torch.linspace(0, heads - 1, count, device=args[first].device).round().long()
    group = args[queries].shape[1] // heads
    rows = (kept[:, None] * group + torch.arange(group, device=kept.device)).flatten()
    part = {**args, queries: args[queries].index_select(1, rows)}
    part.update({name: args[name].index_select(dim, kept) for name, dim in keys.items()})
    if args.get("sinks") is not None:
        part["sinks"] = args["sinks"][rows]
    return part, lambda results: [r.index_select(1, rows) for r in results], f", {count} of {heads} heads"


def some_tokens(args: dict[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], Callable, str]:
    count = len(args[names[0]])
    if count <= EXACT_TOKENS:
        return args, list, ""
    kept = torch.linspace(0, count - 1, EXACT_TOKENS, device=args[names[0]].device).round().long()
    part = {**args, **{name: args[name][kept] for name in names}}
    return part, lambda results: [r[kept] for r in results], f", {EXACT_TOKENS} of {count} tokens"


class Judge:
    """Knows what a case's result should be, and how far the reference in the operator's own dtype is from that."""

    def __init__(self, op: Op, args: dict[str, Any], cost: Cost, limit: float = EXACT_FLOPS):
        self.op = op
        part, self.pick, words = reduced(op, args, cost, limit)
        try:
            self.exact, self.exact_args = self._evaluate(part, torch.float64)
            self.checked = "fp64" + words
        except torch.OutOfMemoryError:  # a smaller GPU than the cases were made for
            release()
            self.exact, self.exact_args = self._evaluate(part, torch.float32)
            self.checked = "fp32" + words
        own = contract.copy(part)
        self.own = contract.outputs(op, op.reference(**own), own)

    def _evaluate(self, args: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
        wide = {name: widened(value, dtype) for name, value in args.items()}
        return contract.outputs(self.op, self.op.reference(**wide), wide), wide if self.op.agree else {}

    def __call__(self, result: Any, written: dict[str, Any]) -> contract.Verdict:
        """Raises ContractError (or what the operator's `agree` raises) where a result of ours is wrong."""
        if self.op.agree is not None:
            self.op.agree(self.exact_args, result, self.exact[0] if len(self.exact) == 1 else self.exact)
            return contract.Verdict(0.0, 0.0)
        got = self.pick(contract.outputs(self.op, result, written))
        return contract._close(self.op, got, self.own, self.exact)

    def peer(self, out: Tensor) -> contract.Verdict:
        """Of a peer the first result alone is compared."""
        own, exact = self.own[0], self.exact[0]
        allowed = PEER_SLACK * (2 * contract.distance(own, exact) + contract.floor(own.dtype))
        verdict = contract.Verdict(contract.distance(self.pick([out])[0], exact), allowed)
        if not verdict.error <= allowed:
            raise contract.ContractError(f"error {verdict.error:.3g}, four times our bound is {allowed:.3g}")
        return verdict


def widened(value: Any, dtype: torch.dtype) -> Any:
    """A copy, floating-point numbers as `dtype`; FP8 is storage, exact in itself, and stays."""
    if not isinstance(value, Tensor):
        return value
    number = value.is_floating_point() and value.dtype not in contract.FP8
    return value.to(dtype, copy=True) if number else value.clone()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_ours(op: Op, backend: str, args: dict[str, Any], judge: Judge, device: str) -> tuple[contract.Verdict, float]:
    """Checks, times, and checks that what was timed is what was checked."""
    run = op.backends[backend].run
    mine = contract.copy(args)
    with contract.poisoned():
        result = run(**mine)
    verdict = judge(result, mine)
    first = [t.clone() for t in contract.outputs(op, result, mine)]
    del result
    replay = timing.captured(functools.partial(run, **mine), device)
    ms = timing.median_ms(replay, device)
    for name in op.mutates:
        if mine.get(name) is not None:
            mine[name].copy_(args[name])
    for a, b in zip(first, contract.outputs(op, replay(), mine), strict=True):
        if not contract.same_bits(a, b):
            raise contract.ContractError("the timed call's result is not the one that was checked")
    return verdict, ms


def time_peers(found: Iterable[peers.Peer | str], judge: Judge, device: str) -> Iterator[tuple]:
    """Yields (name, verdict, ms) of each peer's fastest variant, or (name, why not, None)."""
    best: dict[str, tuple[str, contract.Verdict, float]] = {}
    reasons: dict[str, str] = {}
    for peer in found:
        if isinstance(peer, str):
            name, _, reasons[name] = peer.partition(": ")
            continue
        try:
            verdict = judge.peer(peer.finish(peer.call()))
            replay = timing.captured(peer.call, device)
            ms = timing.median_ms(replay, device)
        except Exception as e:  # a peer that cannot run a shape, or gets it wrong, is a result, too
            reasons[peer.name] = f"{type(e).__name__}: {peers.first_line(e)}"
            continue
        label = f"{peer.name} ({peer.variant})" if peer.variant else peer.name
        if peer.name not in best or ms < best[peer.name][2]:
            best[peer.name] = label, verdict, ms
    yield from best.values()
    for name, why in reasons.items():
        if name not in best:
            yield name, why, None


def run_case(op: Op, case: Case, backends: list[str], device: str, peaks: timing.Peaks, root: str | None,
             table: Table) -> bool:
    """Adds the case's rows; False where one of ours is wrong or fails."""
    begin = time.perf_counter()
    fine, ours = True, None
    row = functools.partial(Row, op.name, case.id)
    try:
        args = contract.draw(case, device, seed=0)
        cost = op.cost(**args)
        judge = Judge(op, args, cost)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as e:  # the other cases still run
        table.add(row("reference", note=f"FAILED: {type(e).__name__}: {peers.first_line(e)}"))
        return False
    took = time.perf_counter() - begin
    floors = floor.read_us(cost.bytes, device), floor.copy_us(cost.bytes, device)
    for backend in backends:
        kernel = f"wave64 {backend}"
        supports = op.backends[backend].supports
        if supports is not None and (why := supports(**args)):
            table.add(row(kernel, note=f"declines: {why}"))
            continue
        try:
            verdict, ms = time_ours(op, backend, args, judge, device)
        except Exception as e:  # whatever a kernel raises is a finding
            what = "WRONG" if isinstance(e, AssertionError) else f"FAILED: {type(e).__name__}"
            table.add(row(kernel, note=f"{what}: {peers.first_line(e)}"))
            fine = False
            continue
        ours = ours or ms
        table.add(row(kernel, verdict.error, verdict.bound, judge.checked, timing.speed(ms, cost, peaks), *floors,
                      ms / ours, check_s=took))
        if backend == "triton":
            for stage in stages.stages(op.name, args):
                ms = timing.median_ms(timing.captured(stage.call, device), device)
                table.add(row(f"wave64 {backend}, {stage.name}", speed=timing.speed(ms, stage.cost, peaks),
                              read_us=floor.read_us(stage.cost.bytes, device),
                              copy_us=floor.copy_us(stage.cost.bytes, device), ratio=ms / ours))
        release()
    for name, verdict, ms in time_peers(peers.peers(op.name, args, root), judge, device):
        if ms is None:
            table.add(row(name, note=verdict))
        else:
            table.add(row(name, verdict.error, verdict.bound, judge.checked, timing.speed(ms, cost, peaks), *floors,
                          ms / ours if ours else None, check_s=took))
    return fine


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--backend", nargs="+", default=["triton"], choices=BACKENDS, help="default: %(default)s")
    parser.add_argument("--op", nargs="+", help="these operators of the suite only")
    parser.add_argument("--case", default="", help="cases with this in their name only")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--peers", metavar="FOLDER", help="unpacked files of the peers (peers.py says which)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there, one JSON object per line")
    parser.add_argument("--markdown", action="store_true", help="print the table for RESULTS.md")
    args = parser.parse_args(argv)
    device = args.device
    if device == "cuda" and not torch.cuda.is_available():
        print("bench.py needs a GPU (--device cpu with TRITON_INTERPRET=1 tests the harness)", file=sys.stderr)
        return 2
    for backend in args.backend:
        if why := probe(backend, device):
            print(f"backend {backend}: {why}", file=sys.stderr)
            return 2
    names = [name for name in args.op or SUITES[args.suite] if name in OPS]
    if unknown := set(args.op or ()) - set(SUITES[args.suite]):
        parser.error(f"{', '.join(sorted(unknown))}: not in {args.suite}: {', '.join(SUITES[args.suite])}")
    work = [(OPS[name], case) for name in names for case in OPS[name].cases()
            if case.large == (device == "cuda") and args.case in case.id]
    if not work:
        print("no such case", file=sys.stderr)
        return 2

    torch.set_float32_matmul_precision("highest")  # the reference in fp32 is no judge in TF32
    peaks = timing.measure_peaks(device)
    release()
    arch = platform.arch()
    table = Table(args.markdown, args.json)
    table.begin(dict(
        device=f"{torch.cuda.get_device_name()}{f' ({arch.name})' if arch else ''}" if device == "cuda" else "CPU",
        torch=torch.__version__, triton=triton.__version__, read_gbs=peaks.read_gbs, matmul_tflops=peaks.matmul_tflops,
        launch_us=floor.read_us(0, device),
        command=" ".join(["python tests/bench/bench.py", *(sys.argv[1:] if argv is None else argv)])))
    fine = True
    for op, case in work:
        backends = [b for b in args.backend if b in op.backends]
        for missing in set(args.backend) - set(backends):
            table.add(Row(op.name, case.id, f"wave64 {missing}", note="no such kernel of this operator"))
        fine &= run_case(op, case, backends, device, peaks, args.peers, table)
        release()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
