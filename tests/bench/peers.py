"""Other projects' kernels on the arguments of our cases, to be timed next to ours in the same run.

torch's flash attention is always there. SGLang's and vLLM's portable Triton kernels are run from files of their wheels,
unpacked into one folder and left as they are; nothing of either project is installed or imported whole:

    sglang/kernels/ops/attention/{score_mod,decode_attention,extend_attention}.py
    vllm/v1/attention/ops/triton_{attention_helpers,unified_attention}.py

(`pip download --no-deps sglang vllm`, then unzip those members.) Each file runs under its own dotted name. What it
imports of its package is answered by `answers()`, so that no server, configuration or GPU library of it starts; a
version that asks for more fails to import, and says for what.
"""

import enum
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from wave64 import quant

SGLANG = [f"sglang/kernels/ops/attention/{name}.py" for name in ("score_mod", "decode_attention", "extend_attention")]
VLLM = [f"vllm/v1/attention/ops/triton_{name}.py" for name in ("attention_helpers", "unified_attention")]

#: Segments that vLLM's decode splits the keys into, and the tokens up to which it does: its own settings.
VLLM_SEGMENTS, VLLM_SPLIT_TOKENS = 16, 128


@dataclass(frozen=True)
class Peer:
    """One way to call a peer. Of the variants of one `name` the fastest stands in the table.

    `finish` brings what the call returned into the layout of our operator's first result, outside the timed region."""

    name: str
    variant: str
    call: Callable[[], Any]
    finish: Callable[[Any], Tensor] = lambda result: result


def peers(op: str, args: dict[str, Any], root: str | None) -> Iterator[Peer | str]:
    """Every peer that serves this operator on these arguments; a str is why one of them cannot."""
    plain = args.get("causal", True) and not args.get("logit_cap") and args.get("sliding_window", -1) <= 0
    extras = ("sinks", "k_scale", "v_scale", "kv_scale", "bias")
    if op not in SOURCES or not plain or any(args.get(name) is not None for name in extras):
        return
    for source in SOURCES[op]:
        if root is None and source not in OWN_TORCH:
            continue
        try:
            yield from source(args, *([] if source in OWN_TORCH else [Path(root)]))
        except Exception as e:  # a peer that cannot be loaded or fed is a result, too
            yield f"{source.__name__}: cannot run: {type(e).__name__}: {first_line(e)}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]


# What the peers are given.


def slots_of(args: dict[str, Any], page_size: int) -> list[Tensor]:
    """Of every sequence, page * page_size + row of its keys in order."""
    found = []
    for i, length in enumerate(args["seq_lens"].tolist()):
        position = torch.arange(length, device=args["seq_lens"].device)
        found.append(args["page_table"][i, position // page_size].long() * page_size + position % page_size)
    return found


def uniform(lengths: list[int]) -> bool:
    return bool(lengths) and min(lengths) == max(lengths) > 0


def clean(pool: Tensor) -> Tensor:
    """A copy without the NaN that our cases leave where nothing may be read: peers read further, and multiply by 0."""
    return pool.nan_to_num()


def unwritten(query: Tensor, width: int) -> Tensor:
    """Room for a result [tokens, heads, width], full of NaN: what a peer leaves unwritten is not a right result."""
    return query.new_full((*query.shape[:2], width), float("nan"))


def running_sums(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def _flash(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, **how) -> Iterator[Peer]:
    """torch's flash attention on [B, H, S, D], key heads repeated beforehand or by itself."""

    def call(k, v, **more):
        def run():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, scale=scale, **how, **more)
        return run

    def finish(out):
        return out.transpose(1, 2).flatten(0, 1)

    group = q.shape[1] // k.shape[1]
    if group == 1:
        yield Peer(name, "", call(k, v), finish)
        return
    yield Peer(name, "gqa", call(k, v, enable_gqa=True), finish)
    wide = [kv.repeat_interleave(group, 1) for kv in (k, v)]
    yield Peer(name, "expanded", call(*wide), finish)


def _causal(new: int, length: int) -> dict[str, Any]:
    return {"is_causal": True} if new == length else {"attn_mask": causal_lower_right(new, length)}


def read_keys(cache: Tensor, slots: Tensor) -> Tensor:
    """cache[page, row] of every slot = page * page_size + row: [*slots.shape, num_kv_heads, head_dim]."""
    return cache[slots // cache.shape[1], slots % cache.shape[1]]


def _dense(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values out of their pages: [B, Hkv, S, D], of sequences as long as each other."""
    slots = torch.stack(slots_of(args, args["key_cache"].shape[1]))
    keys, values = (read_keys(args[name], slots).transpose(1, 2).contiguous() for name in ("key_cache", "value_cache"))
    return keys, values


def torch_decode(args: dict[str, Any]) -> Iterator[Peer]:
    if uniform(args["seq_lens"].tolist()):
        yield from _flash("torch flash", args["query"][:, :, None], *_dense(args), args["scale"])


def torch_prefill(args: dict[str, Any]) -> Iterator[Peer]:
    new, lengths = args["cu_seqlens_q"].diff().tolist(), args["seq_lens"].tolist()
    if uniform(new) and uniform(lengths):
        q = args["query"].unflatten(0, (len(new), -1)).transpose(1, 2).contiguous()
        yield from _flash("torch flash", q, *_dense(args), args["scale"], **_causal(new[0], lengths[0]))


def torch_varlen(args: dict[str, Any]) -> Iterator[Peer]:
    """torch's kernel wants one head dimension for all three: values are padded, beforehand, to that of the keys."""
    new, lengths = (args[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    if not uniform(new) or not uniform(lengths):
        return
    q, k, v = (args[name].unflatten(0, (len(new), -1)).transpose(1, 2).contiguous() for name in "qkv")
    width = v.shape[-1]
    name = "torch flash" if width == q.shape[-1] else "torch flash, v padded"
    v = F.pad(v, (0, q.shape[-1] - width))
    for peer in _flash(name, q, k, v, args["scale"], **_causal(new[0], lengths[0])):
        yield Peer(peer.name, peer.variant, peer.call, lambda out, peer=peer: peer.finish(out)[..., :width])


def vllm_unified(args: dict[str, Any], root: Path) -> Iterator[Peer]:
    """Decode (one query per sequence, keys split) and prefill through one kernel."""
    attention = load(root, VLLM).unified_attention
    query, table, num_pages = args["query"], args["page_table"], args["key_cache"].shape[0]
    starts = args.get("cu_seqlens_q")
    decode = starts is None
    if decode:
        starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    # Its tiles read the table past a sequence's last page.
    table = F.pad(table.where((table >= 0) & (table < num_pages), 0), (0, 64))
    out = unwritten(query, query.shape[2])
    split = {}
    if decode:
        stats = [query.new_empty(*query.shape[:2], VLLM_SEGMENTS, dtype=torch.float32) for _ in range(2)]
        mixed = query.new_empty(*query.shape[:2], VLLM_SEGMENTS, query.shape[2], dtype=torch.float32)
        split = dict(seq_threshold_3D=VLLM_SPLIT_TOKENS, num_par_softmax_segments=VLLM_SEGMENTS,
                     softmax_segm_output=mixed, softmax_segm_max=stats[0], softmax_segm_expsum=stats[1])
    given = (query, clean(args["key_cache"]), clean(args["value_cache"]), out, starts, args.get("max_seqlen_q", 1),
             args["seq_lens"], int(args["seq_lens"].max()), args["scale"], True, (-1, -1), table, 0.0, None, None, None)
    yield Peer("vllm unified_attention", "", lambda: attention(*given, kv_quant_mode=0, **split), lambda _: out)


def sglang_extend(args: dict[str, Any], root: Path) -> Iterator[Peer]:
    """The new tokens' keys and values side by side, those before them in the pool, by slot."""
    attention = load(root, SGLANG).extend_attention_fwd
    query, starts = args["query"], args["cu_seqlens_q"]
    slots, new = slots_of(args, args["key_cache"].shape[1]), starts.diff().tolist()
    fresh = torch.cat([s[len(s) - n:] for s, n in zip(slots, new, strict=True)])
    before = torch.cat([*[s[:len(s) - n] for s, n in zip(slots, new, strict=True)], fresh[:1]])  # never empty
    extend = [read_keys(args[name], fresh).contiguous() for name in ("key_cache", "value_cache")]
    pools = [clean(args[name]).flatten(0, 1) for name in ("key_cache", "value_cache")]
    prefixes = running_sums([len(s) - n for s, n in zip(slots, new, strict=True)], query.device)
    out = unwritten(query, query.shape[2])
    given = (query, *extend, out, *pools, starts, prefixes, before, None, True, None, max(new), 1.0, 1.0)
    yield Peer("sglang extend_attention", "", lambda: attention(*given, sm_scale=args["scale"]), lambda _: out)


def sglang_dense(args: dict[str, Any], root: Path) -> Iterator[Peer]:
    attention = load(root, SGLANG).dense_prefill_attention_fwd
    q, k, v = args["q"], args["k"], args["v"]
    out = unwritten(q, v.shape[2])
    given = (q, k, v, out, args["cu_seqlens_q"], args["cu_seqlens_k"], args["max_seqlen_q"])
    yield Peer("sglang dense_prefill", "", lambda: attention(*given, sm_scale=args["scale"]), lambda _: out)


def _sglang_splits(name: str, query: Tensor, keys: Tensor, values: Tensor, slots: list[Tensor], scale: float,
                   root: Path) -> Iterator[Peer]:
    """Its decode with several numbers of splits, which its server chooses by a heuristic: the best one counts."""
    load(root, SGLANG)
    attention = sys.modules["sglang.kernels.ops.attention.decode_attention"].decode_attention_fwd
    starts, every = running_sums([len(s) for s in slots], query.device), torch.cat(slots).int()
    rows, heads, width = *query.shape[:2], values.shape[2]
    for splits in (4, 8, 16, 32, 64):
        out = unwritten(query, width)
        mixed = query.new_empty(rows, heads, splits, width, dtype=torch.float32)
        stats = query.new_empty(rows, heads, splits, dtype=torch.float32)
        counts = torch.full((rows,), splits, dtype=torch.int32, device=query.device)
        given = (query, keys, values, out, starts, every, mixed, stats, counts, splits, scale, 1.0, 1.0)
        yield Peer(name, f"{splits} splits", lambda given=given: attention(*given), lambda _, out=out: out)


def sglang_decode(args: dict[str, Any], root: Path) -> Iterator[Peer]:
    keys, values = (clean(args[name]).flatten(0, 1) for name in ("key_cache", "value_cache"))
    slots = slots_of(args, args["key_cache"].shape[1])
    yield from _sglang_splits("sglang decode_attention", args["query"], keys, values, slots, args["scale"], root)


def sglang_mla(args: dict[str, Any], root: Path) -> Iterator[Peer]:
    if args["q"].ndim == 3:  # one new token per sequence
        pool = clean(args["kv_cache"]).flatten(0, 1)[:, None]
        slots = slots_of(args, args["kv_cache"].shape[1])
        values = pool[..., :args["kv_lora_rank"]]
        yield from _sglang_splits("sglang decode_attention", args["q"], pool, values, slots, args["scale"], root)


def torch_mm(args: dict[str, Any]) -> Iterator[Peer]:
    """The same product of the numbers that the FP8 ones mean, in bf16, and torch's own FP8 product: with scales of
    blocks where this version has it."""
    a, b, blocks = args["a"], args["b"], args.get("block_shape")
    scales = [args["a_scale"], args["b_scale"]]
    if not blocks:
        scales = [scale.reshape(-1, 1) for scale in scales]
    shapes = (blocks and [1, blocks[1]], blocks)
    wide = [quant.dequantize(*of).to(torch.bfloat16) for of in zip((a, b), scales, shapes, strict=True)]
    out = torch.empty(len(a), len(b), dtype=torch.bfloat16, device=a.device)
    yield Peer("torch matmul in bf16", "", lambda: torch.mm(wide[0], wide[1].t(), out=out), lambda _: out)
    if blocks:  # it wants scales of a column side by side
        scales[0] = scales[0].t().contiguous().t()
    scales[1] = scales[1].t()
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]  # it has no public name
    yield Peer("torch _scaled_mm", "", lambda: product(a, b.t(), *scales, out_dtype=out.dtype))


OWN_TORCH = (torch_decode, torch_prefill, torch_varlen, torch_mm)
SOURCES = {
    "fp8_block_scaled_mm": (torch_mm,),
    "fp8_scaled_mm": (torch_mm,),
    "paged_attention": (torch_decode, vllm_unified, sglang_decode),
    "prefill_attention": (torch_prefill, vllm_unified, sglang_extend),
    "varlen_attention": (torch_varlen, sglang_dense),
    "mla_decode": (sglang_mla,),
}


# Loading single files of a package that is not there.


class Off:
    """SGLang's environment variables, none of them set: `envs.NAME.get()` is false."""

    def __getattr__(self, name: str) -> "Off":
        return self

    def get(self) -> bool:
        return False


class Platform:
    """What vLLM's kernels ask of `current_platform`; a question not foreseen here is an AttributeError."""

    def fp8_dtype(self) -> torch.dtype:
        return quant.fp8_dtype()

    def is_device_capability_family(self, capability: int) -> bool:
        gpu = torch.cuda.is_available() and not torch.version.hip
        return gpu and torch.cuda.get_device_capability()[0] == capability // 10


class KVQuantMode(enum.IntEnum):
    """vLLM's codes of how keys and values are stored, those its kernel's launcher compares with."""

    NONE = 0
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


def answers() -> dict[str, dict[str, Any]]:
    """Module -> names that stand in for the rest of the peers' packages: this machine, with every option off."""
    hip = bool(torch.version.hip)
    gpu = torch.cuda.is_available()
    arch = torch.cuda.get_device_properties(0).gcnArchName if gpu and hip else ""
    cores = torch.cuda.get_device_properties(0).multi_processor_count if gpu else 1
    return {
        "sglang.srt.environ": {"envs": Off()},
        "sglang.srt.utils": {
            "is_cuda": lambda: gpu and not hip, "is_hip": lambda: hip, "get_device_core_count": lambda *_: cores,
            "is_gfx95_supported": lambda: arch.startswith("gfx95"),
            "is_gfx1250_supported": lambda: arch.startswith("gfx1250"),
        },
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.platforms": {"current_platform": Platform()},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": KVQuantMode},
    }


def load(root: Path, files: list[str]) -> types.ModuleType:
    """The last of `files`, after those it imports; each is run once."""
    names = [file.removesuffix(".py").replace("/", ".") for file in files]
    if names[-1] not in sys.modules:
        top = names[0].split(".")[0]
        for name, content in answers().items():
            if name.split(".")[0] == top:
                vars(_package(name)).update(content)
        for name, file in zip(names, files, strict=True):
            _package(name.rpartition(".")[0])
            spec = importlib.util.spec_from_file_location(name, root / file)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]  # the next attempt says the same, not that half a module lacks a name
                raise
    return sys.modules[names[-1]]


def _package(name: str) -> types.ModuleType:
    """An empty package of that name, and those above it; what is not put in is not found."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(_package(parent), last, module)
    return sys.modules[name]
