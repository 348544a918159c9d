"""AITER's first stage of MLA decode, in assembly: 16 heads, of one token a sequence, on latents in pages of one token,
in splits that are merged here. Other counts of heads are padded to 16 or taken in groups of 16, and of several new
tokens each is a sequence of its own, that ends where the token sees its last key."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wave64 import ops, platform
from wave64.backends.aiter import bind, call

HEADS, WIDTH, RANK = 16, 576, 512
MAX_SPLITS = 16
STAGE1 = ("Q", "KV", "qo_indptr", "kv_indptr", "kv_page_indices", "kv_last_page_lens", "num_kv_splits_indptr",
          "work_metadata?", "work_meta_data?", "work_indptr", "work_info_set", "max_seqlen_q", "page_size?",
          "nhead_kv?", "softmax_scale", "splitData", "splitLse", "output")


def unsupported(dtype: torch.dtype, width: int, rank: int, kv_cache: Tensor, kv_scale: Tensor | None,
                empty: bool) -> str | None:
    """None, or why these heads and latents are not served."""
    if kv_scale is not None:
        return "takes latents without a scale"
    if dtype != torch.bfloat16 or kv_cache.dtype != dtype:
        return f"takes bf16 queries and latents, these are {dtype} and {kv_cache.dtype}"
    if (width, rank) != (WIDTH, RANK):
        return f"takes latents of {RANK} + {WIDTH - RANK} numbers, these are of {rank} + {width - rank}"
    if not kv_cache.is_contiguous():
        return "takes a contiguous cache"
    return "takes no empty cache and no empty page table" if empty else None


def supports(q: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, kv_lora_rank: int,
             kv_scale: Tensor | None = None) -> str | None:
    return unsupported(q.dtype, q.shape[-1], kv_lora_rank, kv_cache, kv_scale,
                       not (kv_cache.numel() and page_table.numel()))


def slots_of(page_table: Tensor, page_size: int, lengths: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """(where the slots of each row's tokens begin [rows + 1], those slots one after another), for lengths [rows] and as
    many rows of the page table. A row of no tokens has one, slot 0. Nothing waits for the device: the second has the
    size that the page table allows."""
    lengths = lengths.clamp_min(1)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    at = torch.arange(page_table.shape[1] * page_size, device=page_table.device)
    slots = (page_table[:, :, None] * page_size + at[:page_size].int()).flatten(1)
    last = slots.numel()
    goes_to = torch.where(at < lengths[:, None], starts[:-1, None] + at, last)
    indices = torch.zeros(last + 1, dtype=torch.int32, device=page_table.device)
    indices.scatter_(0, goes_to.flatten(), slots.flatten().clamp_(0, num_slots - 1))
    return starts.int(), indices


@bind(ops.mla_decode, {"mla_decode_stage1_asm_fwd": STAGE1}, supports=supports)
def mla_decode(q: Tensor, kv_cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, kv_lora_rank: int,
               kv_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    new, heads = q.shape[1] if q.ndim == 4 else 1, q.shape[-2]
    groups = -(-heads // HEADS)
    rows = q.shape[0] * new * groups
    queries = F.pad(q.reshape(-1, heads, WIDTH), (0, 0, 0, groups * HEADS - heads)).view(rows, HEADS, WIDTH)
    lengths = (seq_lens[:, None] - new + 1 + torch.arange(new, device=q.device)).clamp_min_(0)
    lengths = lengths.flatten().repeat_interleave(groups, output_size=rows)
    num_slots = kv_cache.shape[0] * kv_cache.shape[1]
    starts, indices = slots_of(page_table.repeat_interleave(new * groups, 0, output_size=rows), kv_cache.shape[1],
                               lengths, num_slots)
    splits = max(1, min(MAX_SPLITS, platform.compute_units() // rows))
    ones = torch.ones(rows + 1, dtype=torch.int32, device=q.device)
    ordinal = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    parts = torch.empty(rows, splits, HEADS, RANK, dtype=torch.float32, device=q.device)
    lse = torch.full((rows, splits, HEADS, 1), float("-inf"), device=q.device)
    call("mla_decode_stage1_asm_fwd", Q=queries, KV=kv_cache.view(num_slots, 1, 1, WIDTH), qo_indptr=ordinal,
         kv_indptr=starts, kv_page_indices=indices, kv_last_page_lens=ones[1:], num_kv_splits_indptr=ordinal * splits,
         work_metadata=None, work_meta_data=None, work_indptr=None, work_info_set=None, max_seqlen_q=1, page_size=1,
         nhead_kv=1, softmax_scale=scale, splitData=parts, splitLse=lse,
         output=torch.empty(rows, HEADS, RANK, dtype=q.dtype, device=q.device))
    out, lse = merged(parts, lse, lengths)
    return (out.view(*q.shape[:-2], groups * HEADS, RANK)[..., :heads, :].to(q.dtype).contiguous(),
            lse.view(*q.shape[:-2], groups * HEADS)[..., :heads].contiguous())


def merged(parts: Tensor, lse: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """parts [rows, splits, heads, rank] and lse [rows, splits, heads, 1] of them, -inf where a split has no keys and
    its part is not written -> out [rows, heads, rank] and lse [rows, heads]; 0 and -inf for rows of no keys."""
    none = (lengths == 0)[:, None]
    total = lse.logsumexp(1).squeeze(-1).masked_fill_(none, float("-inf"))
    weights = (lse - total.masked_fill(none, 0)[:, None, :, None]).exp()
    out = torch.where(weights > 0, parts * weights, 0.0).sum(1)
    return out.masked_fill_(none[..., None], 0), total
