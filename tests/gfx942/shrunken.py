"""Small problems that launch what large cases launch: real tiles and real constexprs, few of them.

What a large case or a row of a tuned table makes of a kernel besides its configuration is its `Shape`: element types,
widths of heads, the page size, experts a token and so on. `problems(op, shape, config)` yields small arguments of that
shape, the likeliest first: tiles that are full and tiles that are not, and loops that go round several times. Of a
storage beyond 2 GiB, for which Triton compiles a binary of its own, only the rows are in use that the problem needs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wave64 import pools
from wave64.ops.concat_and_cache_mla import long_rows
from wave64.ops.fp8_block_scaled_mm import make_case as make_block_product
from wave64.ops.fp8_scaled_mm import make_case as make_product
from wave64.ops.fused_moe import granularity
from wave64.ops.fused_moe import make_case as make_experts
from wave64.ops.mla_decode import make_case as make_latents
from wave64.ops.mla_decode_rope import make_case as make_rotated
from wave64.ops.paged_attention import make_case as make_decode
from wave64.ops.prefill_attention import make_prefill
from wave64.ops.varlen_attention import make_case as make_ragged

Shape = dict[str, Any]
Problem = Callable[[], dict[str, Any]]
#: Storages from here on have binaries of their own: Triton's offsets into smaller ones are of 32 bits.
VAST_BYTES = 2**31
HALF = torch.bfloat16
#: A head's width where a row asks for none. Of an output of a single element the judge would want each sum to 1e-6 of
#: itself, though its terms cancel; 24 is masked, for blocks have 32.
HEAD = 24
#: keys that a page table has columns for, of which the number of parts that a merge is compiled for follows
WIDTHS = (256, 128, 512, 1024, 2048, 4096)
#: columns of both factors that splits along K and their merge follow from
COLUMNS = (384, 1024, 2048, 4096, 7168)


# ---- products

def _product(args: dict[str, Any]) -> Shape:
    return dict(out_dtype=args["out_dtype"], per="tensor" if args["a_scale"].ndim == 1 else "channel")


def _block_product(args: dict[str, Any]) -> Shape:
    return dict(out_dtype=args["out_dtype"], block_shape=args["block_shape"])


def _products(make: Callable, shape: Shape, config: Any) -> Iterator[Problem]:
    for columns in COLUMNS:
        yield partial(make, config.block_m + 3, config.block_n + 16, columns, **shape)


# ---- experts

def _experts(args: dict[str, Any]) -> Shape:
    kind = granularity(args.get("w13_scale"), args.get("block_shape"))
    return dict(hidden=args["w2"].shape[1], inter=args["w2"].shape[2], top_k=args["topk_ids"].shape[1],
                dtype=args["x"].dtype, scales=kind, block_shape=args.get("block_shape"))


def _experts_of(key: dict[str, Any]) -> Shape:
    kind = key["kind"]
    return dict(hidden=1024, inter=256, top_k=8, dtype=torch.float32 if kind == "fp32" else HALF,
                scales={"row": "channel", "block": "block"}.get(kind, ""),
                block_shape=[128, 128] if kind == "block" else None)


def _few_experts(shape: Shape, config: Any) -> Iterator[Problem]:
    """Every token goes to the first experts, so that each has a full tile of pairs and one that is not; the others have
    none. Rows of several thousand columns, which the sum of pairs is compiled for, come with few tokens."""
    shape = shape | dict(hidden=min(shape["hidden"], 1024), inter=min(shape["inter"], 256))
    yield partial(_to_two, 3 if config.few else config.block_m + 3, **shape)
    yield partial(_to_two, 3, **shape | dict(hidden=2048))
    yield partial(_to_two, 1040 // shape["top_k"], **shape)
    yield partial(make_experts, 64, experts=8, **shape)


def _to_two(tokens: int, top_k: int, **shape: Any) -> dict[str, Any]:
    """The same two experts for all tokens; the other ids mean none."""
    args = make_experts(tokens, 3 + top_k, top_k, one=True, **shape)
    args["topk_ids"][:, 2:] = -1
    return args


# ---- decode

def _widened(make: Callable, seq_lens: list[int], width: int, page_size: int, **options: Any) -> dict[str, Any]:
    """A problem whose page table has columns for `width` keys, of which few are there."""
    args = make(seq_lens, page_size=page_size, **options)
    wide = torch.full((len(seq_lens), width // page_size), 2147480000, dtype=torch.int32)
    columns = min(wide.shape[1], args["page_table"].shape[1])
    wide[:, :columns] = args["page_table"][:, :columns]
    return args | dict(page_table=wide)


def _decodes(make: Callable, shape: Shape, config: Any) -> Iterator[Problem]:
    """Two sequences with keys for several parts, the second's ending within a block; where the batch is one whose
    lengths a program looks at in several steps, many of one key or none next to them."""
    shape = dict(shape)
    rest = [1] * 3 + [0] * 28 if shape.pop("num_seqs") > 32 else []
    for width in WIDTHS:
        lengths = [min(4 * config.min_keys - 56, width - 28), config.min_keys // 2 + 7, *rest]
        yield partial(_widened, make, lengths, width, **shape)


def _pages(shape: Shape, config: Any) -> Iterator[Problem]:
    """Decodes; in storages as large as a large case's where its cache has more than 2 GiB."""
    if not shape.pop("vast", False):
        yield from _decodes(make_decode, shape, config)
        return
    rest = [1] * 3 + [0] * 28 if shape.pop("num_seqs") > 32 else []
    for width in WIDTHS:
        yield partial(_vast, [2 * config.min_keys - 9, config.min_keys // 2 + 7, *rest], width, **shape)


def _vast(seq_lens: list[int], width: int, page_size: int, **options: Any) -> dict[str, Any]:
    """Keys and values in one storage of 3 GiB, each in a half of it."""
    names = ("key_cache", "value_cache")
    args = _widened(make_decode, seq_lens, width, page_size, **options)
    args = pools.spread(args, names, VAST_BYTES * 3 // 4, page_size, tables=["page_table"])
    both = torch.empty(2, *args[names[0]].shape, dtype=args[names[0]].dtype)
    for name, pool in zip(names, both, strict=True):
        rows = pools.rows_in_use(pool)
        pool[rows] = args[name][rows]
        args[name] = pool
    return args


def _latents(q: Tensor, q_pe: Tensor, args: dict[str, Any], rank: int) -> Shape:
    cache = args["kv_cache"]
    return dict(num_seqs=q.shape[0], heads=q.shape[-2], queries=q.shape[1] if q.ndim == 4 else 0, rank=rank,
                rope=cache.shape[2] - rank, page_size=cache.shape[1], dtype=q.dtype, fp8=cache.dtype.itemsize == 1)


def _latents_of(key: dict[str, Any]) -> Shape:
    return dict(num_seqs=key["num_seqs"], heads=min(key["rows"], 128), page_size=64,
                dtype=torch.float32 if key["fp32"] else HALF, fp8=key["fp8"],
                **dict(rank=128) if key["fp32"] else {})


def _heads(args: dict[str, Any]) -> Shape:
    _, heads, head_dim = args["query"].shape
    cache = args["key_cache"]
    return dict(heads=heads, kv_heads=cache.shape[2], head_dim=head_dim, page_size=cache.shape[1],
                dtype=args["query"].dtype, fp8=cache.dtype.itemsize == 1)


def _decode(args: dict[str, Any]) -> Shape:
    shape = _heads(args)
    group = shape["heads"] // shape["kv_heads"]
    vast = args["key_cache"].untyped_storage().nbytes() >= VAST_BYTES
    return shape | dict(num_seqs=args["query"].shape[0], heads=16, kv_heads=16 // group, vast=vast)


def _decode_of(key: dict[str, Any]) -> Shape:
    group = min(key["group"], 16)
    return dict(num_seqs=key["num_seqs"], heads=2 * group, kv_heads=2, head_dim=max(key["head_dim"], HEAD),
                page_size=16, dtype=torch.float32 if key["fp32"] else HALF, fp8=key["fp8"])


# ---- prompts

def _prompt(args: dict[str, Any]) -> Shape:
    shape = _heads(args)
    group = shape["heads"] // shape["kv_heads"]
    return shape | dict(heads=2 * group, kv_heads=2, causal=args.get("causal", True),
                        sliding_window=args.get("sliding_window", -1), logit_cap=args.get("logit_cap", 0.0))


def _prompt_of(key: dict[str, Any]) -> Shape:
    return dict(heads=4, kv_heads=2, head_dim=max(key["head_dim"], HEAD),
                dtype=torch.float32 if key["fp32"] else HALF, logit_cap=8.0 if key["capped"] else 0.0)


def _prompts(shape: Shape, config: Any) -> Iterator[Problem]:
    """New tokens of a full tile and of one that is not, behind blocks of keys that all of them see."""
    new = [config.block_m + 5, 3]
    yield partial(make_prefill, new, [new[0] + 3 * config.block_n + 7, 3], **shape)


def _ragged(args: dict[str, Any]) -> Shape:
    group = args["q"].shape[1] // args["k"].shape[1]
    return dict(heads=2 * group, kv_heads=2, qk_dim=args["q"].shape[2], v_dim=args["v"].shape[2],
                dtype=args["q"].dtype, causal=args.get("causal", True))


def _ragged_of(key: dict[str, Any]) -> Shape:
    return dict(heads=2, kv_heads=1, qk_dim=max(key["qk_dim"], HEAD), v_dim=max(key["v_dim"], HEAD),
                dtype=torch.float32 if key["fp32"] else HALF)


def _raggeds(shape: Shape, config: Any) -> Iterator[Problem]:
    queries = [config.block_m + 5, 3]
    yield partial(make_ragged, queries, [queries[0] + 3 * config.block_n + 7, 3], **shape)


# ---- others

def _new_latents(shape: Shape, config: Any) -> Iterator[Problem]:
    """Rows that span more than 2 GiB, all of them in use."""
    yield partial(long_rows, 2 * pools.AT_EACH, 4)


def _many_numbers(shape: Shape, config: Any) -> Iterator[Problem]:
    """As many as make more blocks than there are programs."""
    yield partial(_one_row, shape["given"])


def _one_row(given: bool) -> dict[str, Any]:
    x = torch.randn(1, 1230 * 8192 - 80, dtype=HALF)
    return dict(x=x, scale=torch.tensor([1.23])) if given else dict(x=x)


#: operator -> (shape of a case's arguments, of a row's tuning key, problems)
SHRINKING = {
    "fp8_scaled_mm": (_product, lambda key: dict(out_dtype=HALF), partial(_products, make_product)),
    "fp8_block_scaled_mm": (_block_product, lambda key: dict(out_dtype=HALF), partial(_products, make_block_product)),
    "fused_moe": (_experts, _experts_of, _few_experts),
    "mla_decode": (lambda args: _latents(args["q"], args["q"], args, args["kv_lora_rank"]), _latents_of,
                   partial(_decodes, make_latents)),
    "mla_decode_rope": (lambda args: _latents(args["q_nope"], args["q_pe"], args, args["q_nope"].shape[-1]),
                        _latents_of, partial(_decodes, make_rotated)),
    "paged_attention": (_decode, _decode_of, _pages),
    "prefill_attention": (_prompt, _prompt_of, _prompts),
    "varlen_attention": (_ragged, _ragged_of, _raggeds),
    "concat_and_cache_mla": (lambda args: {}, None, _new_latents),
    "per_tensor_quant_fp8": (lambda args: dict(given="scale" in args), None, _many_numbers),
}
#: what a row that does not ask for it serves as well
KINDS = {
    "fused_moe": [dict(kind=kind) for kind in ("half", "block", "row", "fp32")],
    "mla_decode": [dict(fp32=False, fp8=False), dict(fp32=False, fp8=True), dict(fp32=True, fp8=False)],
    "prefill_attention": [dict(fp32=fp32, capped=capped) for fp32 in (False, True) for capped in (False, True)],
    "varlen_attention": [dict(fp32=False), dict(fp32=True)],
}
KINDS |= {op: KINDS["mla_decode"] for op in ("mla_decode_rope", "paged_attention")}
