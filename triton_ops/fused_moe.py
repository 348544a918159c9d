"""Mixture of experts: the sequence of launches; the products are in moe_gemm.py.

Many tokens take five launches: quantize x (FP8 weights), sort (token, expert) pairs by expert, first product with the
activation, second product, sum over the pairs of each token. Few take two: the products, with unsorted pairs.
On CDNA, few pairs make few programs. Each has the loads of eight steps in flight, 2 to 4 MB together, which covers the
latency of memory, and the operands are swapped, so that gate and up are two tiles for two waves. Where reading weights
is the bound, tiles are narrower than the 128 columns of a group, for more programs, and the second product quantizes h
as it loads it.
Bound by reading the chosen experts' weights, with many tokens by the matrix cores.
"""

from dataclasses import dataclass, field, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64 import platform
from wave64.arch import Arch
from wave64.ops import fused_moe
from wave64.ops.fused_moe import granularity
from wave64.quant import FP8
from wave64.triton_ops import moe_align_block_size, per_token_group_quant_fp8, per_token_quant_fp8
from wave64.triton_ops.attention import is_wide
from wave64.triton_ops.geometry import matrix_options, num_stages, num_warps
from wave64.triton_ops.moe_gemm import (
    PER_BLOCK,
    PER_ROW,
    UNSCALED,
    _moe_combine_kernel,
    _moe_down_few_kernel,
    _moe_down_kernel,
    _moe_gate_up_kernel,
)
from wave64.triton_ops.quant import limits
from wave64.tuning import Tuning

KINDS = {"": UNSCALED.value, "tensor": PER_ROW.value, "channel": PER_ROW.value, "block": PER_BLOCK.value}
#: Experts per token, at most, whose rows make one tile of the second product.
FEW_EXPERTS = 16
#: Columns per program of the sum over pairs.
COMBINED = 2048


@dataclass(frozen=True)
class Config:
    """How the kernels are launched. up_: the first product; down_: the second."""

    block_m: int            # pairs of an expert per program
    up_n: int               # columns of h
    up_k: int
    up_warps: int
    up_stages: int
    down_n: int             # few: rows of weights of all experts of a token
    down_k: int
    down_warps: int
    down_stages: int
    group_m: int = 1        # blocks of pairs that read a tile of weights together
    xcds: int = 1           # chiplets, each with an L2, that programs are assigned to round robin
    few: bool = False       # pairs are not sorted: each is a block of one
    late: bool = False      # each program quantizes the groups of x that it reads
    swap: bool = False      # weights are the left operand, for instructions with 64 rows
    unroll: int = 1         # steps of the first product whose loads are in flight together
    options: dict = field(default_factory=dict)


#: per_expert: pairs of an expert, on average.
BUCKETS = {"pairs": (32,), "per_expert": (4, 16, 64, 256), "inter": (512,)}
#: Candidates by the upper bound of per_expert: (block_m, up_n, waves, stages, swap) ...
HOPPER = {16: [(16, 32, 4, 6, True), (16, 64, 4, 3, True), (16, 64, 4, 5, True), (16, 128, 8, 3, True)],
          64: [(32, 64, 4, 4, True), (32, 128, 8, 3, True), (64, 64, 4, 4, False), (64, 128, 8, 3, False)],
          None: [(64, 128, 8, 3, False), (64, 128, 8, 4, False), (128, 64, 8, 4, False), (128, 128, 8, 3, False)]}
#: ... and for each of them (down_n, waves, stages). Rows are short, so deep pipelines would only cost LDS.
HOPPER_DOWN = [(128, 4, 2), (256, 8, 2), (128, 4, 4)]
OTHERS = {16: [(16, 32, 2, False), (16, 64, 4, False), (16, 128, 8, False), (32, 64, 4, False), (32, 128, 8, False)],
          64: [(32, 128, 8, False), (64, 64, 4, False), (64, 128, 4, False), (64, 128, 8, False)],
          None: [(64, 128, 8, False), (128, 64, 4, False), (128, 128, 4, False), (128, 128, 8, False),
                 (256, 128, 8, False)]}
#: Candidates for unsorted pairs: (up_n, waves, swap); on Hopper (up_n, waves, stages, unroll).
FEW = [(16, 1, False), (16, 2, True), (32, 2, True), (32, 4, True)]
HOPPER_FEW = [(16, 2, 8, 1), (16, 4, 8, 1), (32, 4, 8, 1), (16, 2, 3, 4), (16, 4, 3, 4), (32, 4, 3, 4), (16, 2, 4, 2),
              (32, 4, 4, 2)]


def key(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, w13_scale: Tensor | None = None,
        w2_scale: Tensor | None = None, block_shape: list[int] | None = None, **others) -> dict[str, int | str]:
    """The tuning key of a call."""
    experts, hidden, inter = w2.shape
    kind = granularity(w13_scale, block_shape) or ("fp32" if x.dtype == torch.float32 else "half")
    # Hopper's matrix instructions need copies of 16 bytes, and tiles with rows of 128 bytes.
    strides = (hidden, inter, x.stride(0), *w13.stride()[:2], *w2.stride()[:2])
    aligned = all(n % 16 == 0 for n in strides) and (not block_shape or block_shape[1] == 128)
    return {"kind": "row" if kind in ("tensor", "channel") else kind, "pairs": topk_ids.numel(),
            "per_expert": triton.cdiv(topk_ids.numel(), experts), "inter": inter, "aligned": aligned}


def work(config: Config, per_expert: int, **others) -> int:
    """Products that a program of the first kernel computes at a time, without rows beyond an expert's pairs."""
    return min(config.block_m, per_expert) * config.up_n * config.up_k


def candidates(arch: Arch, kind: str, pairs: int, per_expert: int, aligned: bool, **others) -> list[Config]:
    """What the tuner tries."""
    size = 4 if kind == "fp32" else 2 if kind == "half" else 1
    bucket = 16 if per_expert <= 16 else 64 if per_expert <= 64 else None
    if arch.matrix == "wgmma" and aligned and size < 4:
        return _candidates_with_wgmma(arch, size, pairs, per_expert, bucket)
    mfma, tried = arch.matrix == "mfma", []
    options = matrix_options(arch, 16) if mfma else {}

    def add(m: int, n: int, k: int, waves: int, s: int, down_n: int, **more) -> None:
        lds_bytes = max(1, s - 1 if arch.vendor == "amd" else s) * more.get("unroll", 1) * (m + 2 * n) * k * size
        config = Config(m, n, k, waves, s, down_n, max(k, 64), waves, min(s, 4), **more, options=options)
        if lds_bytes <= arch.lds_bytes and config not in tried:
            tried.append(config)

    if pairs <= 32:
        for n, waves, swap in FEW:
            for k, s, unroll in ((128, 2, 1), (128, 2, 4), (128, 2, 8)) if mfma else ((32, 1, 1), (64, 2, 1)):
                add(16, n, k, waves, s, 128 if mfma else 64, few=True, swap=swap, unroll=unroll)
        return tried
    for m, n, waves, swap in OTHERS[bucket]:
        more = dict(swap=swap, group_m=1 if per_expert <= m else 8, xcds=arch.xcds)
        for deep in (False, True):
            if mfma:
                add(m, n, (128 if deep else 64) // size, waves, 2, 2 * n if size == 2 else min(128, 2 * n), **more)
            else:
                add(min(m, 64), min(n, 64), 32, waves, 2 if deep else 1, 64, **more)
    return tried


def _candidates_with_wgmma(arch: Arch, size: int, pairs: int, per_expert: int, bucket: int | None) -> list[Config]:
    k = 128 // size
    if pairs <= 32:
        ups = [((16, n, 128, waves, s), dict(few=True, swap=True, unroll=unroll)) for n, waves, s, unroll in HOPPER_FEW]
        downs = [(n, 128, waves, s) for n, waves, s in HOPPER_DOWN[:2]]
    else:
        ups = [((m, n, k, waves, s), dict(swap=swap, group_m=1 if per_expert <= m else 8))
               for m, n, waves, s, swap in HOPPER[bucket]]
        downs = [(n, k, waves, s) for n, waves, s in HOPPER_DOWN]
    fit = [(up, more) for up, more in ups
           if up[4] * more.get("unroll", 1) * (up[0] + 2 * up[1]) * up[2] * size <= arch.lds_bytes]
    found = [Config(*up, *down, **more) for up, more in fit for down in downs]
    return [config for i, config in enumerate(found) if config not in found[:i]]


TUNING = Tuning("fused_moe", config=Config, key=key, buckets=BUCKETS, candidates=candidates, work=work)


# ---- the stages


@dataclass(frozen=True)
class Routing:
    """Blocks of (token, expert) pairs; a pair is an index into topk_ids."""

    topk_ids: Tensor
    expert_map: Tensor | None
    experts: int               # local experts
    block_ids: Tensor          # the router's expert id of each block
    pairs: Tensor | None       # sorted by expert, in blocks; None: each pair is a block
    end: Tensor | None         # number of pairs with padding

    @property
    def routed(self) -> int:
        """Number of the router's expert ids."""
        return self.experts if self.expert_map is None else self.expert_map.shape[0]

    def arguments(self) -> tuple:
        """Arguments of both products."""
        return (self.block_ids, self.pairs, self.end, self.expert_map, self.topk_ids.numel(), self.routed,
                self.experts, self.block_ids.numel())

    def grid(self, tiles: int, config: Config) -> tuple[int]:
        together = config.group_m * config.xcds
        return (triton.cdiv(self.block_ids.numel(), together) * together * tiles,)


def route(topk_ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int) -> Routing:
    """Sort the pairs into blocks of block_m; 0: do not sort, each pair is a block."""
    if not block_m:
        return Routing(topk_ids, expert_map, experts, topk_ids, None, None)
    routed = experts if expert_map is None else expert_map.shape[0]
    ordered, block_ids, end = moe_align_block_size.launch(topk_ids, block_m, routed)
    return Routing(topk_ids, expert_map, experts, block_ids, ordered, end)


def quantize(x: Tensor, block_shape: list[int] | None, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize x per row, or per group of the columns of a block: (q, scale)."""
    return per_token_group_quant_fp8.launch(x, block_shape[1], ue8m0) if block_shape else per_token_quant_fp8.launch(x)


def _weight_arguments(weight: Tensor, scale: Tensor | None, block_shape: list[int] | None, block_k: int,
                      ue8m0: bool = False) -> dict[str, int | float]:
    """Kernel arguments for weights [E, N, K] and their scales. BLOCK_K divides the columns of a scale's block."""
    kind = KINDS[granularity(scale, block_shape)]
    group_n, group_k = block_shape or (1, 1)
    if block_shape:
        block_k = min(block_k, group_k)
    of_type = limits(weight.dtype, ue8m0) if kind else dict(LIMIT=0.0, BELOW=0.0)
    return dict(stride_we=weight.stride(0), stride_wn=weight.stride(1),
                stride_se=scale.stride(0) if scale is not None else 0,
                stride_sn=scale.stride(1) if scale is not None and scale.ndim > 1 else 0, K=weight.shape[2],
                SCALED=kind, **of_type, GROUP_N=group_n, GROUP_K=group_k, EVEN=weight.shape[2] % block_k == 0,
                BLOCK_K=block_k)


def first_product(x: Tensor, x_scale: Tensor | None, dtype: torch.dtype, w13: Tensor, w13_scale: Tensor | None,
                  weights: Tensor | None, routing: Routing, block_shape: list[int] | None, activation: str,
                  config: Config, ue8m0: bool = False) -> tuple[Tensor, Tensor | None]:
    """h [pairs, inter] = act(gate) * up. Returns (h in dtype, None), or (h quantized, scales) if programs have whole
    groups."""
    pairs, inter = routing.topk_ids.numel(), w13.shape[1] // 2
    group = block_shape[1] if block_shape else 0
    whole = config.up_n == group and not config.few
    h = torch.empty((pairs, inter), dtype=w13.dtype if whole else dtype, device=x.device)
    h_scale = torch.empty((pairs, triton.cdiv(inter, group)), dtype=torch.float32, device=x.device) if whole else None
    w = _weight_arguments(w13, w13_scale, block_shape, config.up_k if x_scale is not None else max(config.up_k, group),
                          ue8m0)
    one = w["GROUP_N"] % config.up_n == 0 and inter % config.up_n == 0
    _moe_gate_up_kernel[routing.grid(triton.cdiv(inter, config.up_n), config)](
        h, h_scale, x, x_scale, w13, w13_scale, weights, *routing.arguments(), stride_x=x.stride(0), N=inter,
        TOP_K=routing.topk_ids.shape[1], ACTIVATION=activation, DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
        ONE=one, WIDE=is_wide(x), SWAP=config.swap, UNROLL=config.unroll, GROUP_M=config.group_m, XCDS=config.xcds,
        BLOCK_M=config.block_m, BLOCK_N=config.up_n, **w, num_warps=config.up_warps,
        num_stages=num_stages(config.up_stages, config.up_warps, w["BLOCK_K"], (x, config.block_m),
                              (w13, config.up_n)), **config.options)
    return h, h_scale


def second_product(h: Tensor, h_scale: Tensor | None, dtype: torch.dtype, w2: Tensor, w2_scale: Tensor | None,
                   weights: Tensor | None, routing: Routing, block_shape: list[int] | None, config: Config,
                   ue8m0: bool = False) -> Tensor:
    """y [pairs, hidden] = weight * h w2^T; rows of pairs without a local expert are not written."""
    hidden, group = w2.shape[1], block_shape[1] if block_shape else 0
    y = torch.empty((h.shape[0], hidden), dtype=dtype, device=h.device)
    w = _weight_arguments(w2, w2_scale, block_shape, config.down_k if h_scale is not None else max(config.down_k,
                                                                                                   group), ue8m0)
    _moe_down_kernel[routing.grid(triton.cdiv(hidden, config.down_n), config)](
        y, h, h_scale, w2, w2_scale, weights, *routing.arguments(), N=hidden,
        ONE=w["GROUP_N"] % config.down_n == 0, WIDE=is_wide(h), SWAP=config.swap, GROUP_M=config.group_m,
        XCDS=config.xcds, BLOCK_M=config.block_m, BLOCK_N=config.down_n, **w, num_warps=config.down_warps,
        num_stages=num_stages(config.down_stages, config.down_warps, w["BLOCK_K"], (h, config.block_m),
                              (w2, config.down_n)), **config.options)
    return y


def combine(out: Tensor, y: Tensor, routing: Routing) -> None:
    """out [tokens, hidden] = the sum over the pairs of each token."""
    tokens, hidden = out.shape
    block = min(COMBINED, triton.next_power_of_2(hidden))
    _moe_combine_kernel[tokens, triton.cdiv(hidden, block)](
        out, y, routing.topk_ids, routing.expert_map, routing.routed, routing.experts, hidden,
        TOP_K=routing.topk_ids.shape[1], BLOCK=block, num_warps=num_warps(block // 8))


def second_product_of_few(out: Tensor, h: Tensor, w2: Tensor, w2_scale: Tensor | None, weights: Tensor | None,
                          routing: Routing, block_shape: list[int] | None, config: Config,
                          ue8m0: bool = False) -> None:
    """out = the second product of unsorted pairs, summed over the pairs of each token."""
    (tokens, hidden), top_k = out.shape, routing.topk_ids.shape[1]
    block_j = triton.next_power_of_2(top_k)
    block_n = max(16, config.down_n // block_j)
    w = _weight_arguments(w2, w2_scale, block_shape, max(config.down_k, block_shape[1] if block_shape else 0), ue8m0)
    _moe_down_few_kernel[triton.cdiv(hidden, block_n), tokens](
        out, h, w2, w2_scale, weights, routing.topk_ids, routing.expert_map, routing.routed, routing.experts, N=hidden,
        TOP_K=top_k, BLOCK_J=block_j, BLOCK_C=max(16, block_j), BLOCK_N=block_n, **w, num_warps=config.down_warps,
        num_stages=num_stages(config.down_stages, config.down_warps, w["BLOCK_K"], (w2, block_n)),
        **config.options)


def unsupported(x, w13, w2, topk_weights, topk_ids, w13_scale=None, w2_scale=None, block_shape=None,
                *others, **options) -> str | None:
    """The reason why the Triton kernels do not support these arguments, or None."""
    arch = platform.arch()
    fp8_type = str(w13.dtype).removeprefix("torch.float8_")
    if arch is not None and w13.dtype in FP8.values() and arch.fp8 != fp8_type:
        return f"{fp8_type} weights on {arch.name}, whose FP8 type is {arch.fp8}"
    if block_shape is not None and block_shape[1] not in (32, 64, 128):
        return f"takes blocks of 32, 64 or 128 columns, not {block_shape[1]}"
    if is_wide(w13[:1]) or is_wide(w2[:1]):
        return "takes experts of at most 2 GiB"
    return None


@fused_moe.backend("triton", tuning=TUNING, supports=unsupported)
def launch(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, w13_scale: Tensor | None = None,
           w2_scale: Tensor | None = None, block_shape: list[int] | None = None, activation: str = "silu",
           apply_router_weight_on_input: bool = False, expert_map: Tensor | None = None,
           scale_ue8m0: bool = False) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = TUNING.choose(**key(x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, block_shape))
    if topk_ids.shape[1] > FEW_EXPERTS:
        config = replace(config, few=False)
    before, after = (topk_weights, None) if apply_router_weight_on_input else (None, topk_weights)
    routing = route(topk_ids, expert_map, w13.shape[0], 0 if config.few else config.block_m)
    q, q_scale = x, None
    if w13_scale is not None and not (config.late and block_shape):
        q, q_scale = quantize(x, block_shape, scale_ue8m0)
    h, h_scale = first_product(q, q_scale, x.dtype, w13, w13_scale, before, routing, block_shape, activation, config,
                               scale_ue8m0)
    if config.few:
        second_product_of_few(out, h, w2, w2_scale, after, routing, block_shape, config, scale_ue8m0)
        return out
    if w2_scale is not None and not block_shape:
        h, h_scale = quantize(h, None)
    y = second_product(h, h_scale, x.dtype, w2, w2_scale, after, routing, block_shape, config, scale_ue8m0)
    combine(out, y, routing)
    return out
