"""Penalties: a block per sequence touches only the logits of tokens that occur, not the whole vocabulary.

The trick: a scratch buffer of counts that is never cleared as a whole. Zero it at the row's ids, count there with
atomics; then the first lane that exchanges the count of an id for 0 applies the penalty, once. The result does not
depend on which lane is first.
Bound by the latency of a row's random accesses: 8 bytes per id, a sector of scratch and of logits per distinct id.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wave64.ops import apply_penalties
from wave64.triton_ops.geometry import num_warps

BLOCK = 1024
#: Set for tokens of the prompt; the bits below count output tokens.
PROMPT = tl.constexpr(1 << 24)


@triton.jit
def _ids(ids_ptr, start, width, vocab, BLOCK: tl.constexpr):
    """Load ids [start, start + BLOCK) of a row. Returns (ids, mask of those that are tokens, not padding)."""
    offs = start + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + offs, mask=offs < width, other=-1)
    return ids, (ids >= 0) & (ids < vocab)


@triton.jit
def _clear(count_ptr, ids_ptr, width, vocab, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        ids, mask = _ids(ids_ptr, start, width, vocab, BLOCK)
        tl.store(count_ptr + ids, tl.zeros([BLOCK], tl.int32), mask=mask)


@triton.jit
def _penalize(logits_ptr, count_ptr, ids_ptr, width, vocab, presence, frequency, repetition, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        ids, mask = _ids(ids_ptr, start, width, vocab, BLOCK)
        # `and` with 0 instead of an exchange, which does not compile for AMD in Triton 3.6
        count_bits = tl.atomic_and(count_ptr + ids, tl.zeros([BLOCK], tl.int32), mask=mask, sem="relaxed")
        count_bits = tl.where(mask, count_bits, 0)
        mask = count_bits != 0
        logit = tl.load(logits_ptr + ids, mask=mask, other=0.0).to(tl.float32)
        logit = tl.where(logit > 0, logit / repetition, logit * repetition)
        count = (count_bits & (PROMPT - 1)).to(tl.float32)
        logit -= frequency * count + tl.where(count > 0, presence, 0.0)
        tl.store(logits_ptr + ids, logit.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _apply_penalties_kernel(logits_ptr, prompt_ptr, output_ptr, presence_ptr, frequency_ptr, repetition_ptr, count_ptr,
                            logits_stride, vocab, prompt_width, output_width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    count_ptr += row * vocab
    prompt_ptr += row * prompt_width
    output_ptr += row * output_width
    presence, frequency = tl.load(presence_ptr + row), tl.load(frequency_ptr + row)
    repetition = tl.load(repetition_ptr + row)

    _clear(count_ptr, prompt_ptr, prompt_width, vocab, BLOCK)
    _clear(count_ptr, output_ptr, output_width, vocab, BLOCK)
    tl.debug_barrier()
    for start in range(0, prompt_width, BLOCK):
        ids, mask = _ids(prompt_ptr, start, prompt_width, vocab, BLOCK)
        tl.atomic_or(count_ptr + ids, tl.full([BLOCK], PROMPT, tl.int32), mask=mask, sem="relaxed")
    for start in range(0, output_width, BLOCK):
        ids, mask = _ids(output_ptr, start, output_width, vocab, BLOCK)
        tl.atomic_add(count_ptr + ids, tl.full([BLOCK], 1, tl.int32), mask=mask, sem="relaxed")
    tl.debug_barrier()
    _penalize(logits_ptr, count_ptr, prompt_ptr, prompt_width, vocab, presence, frequency, repetition, BLOCK)
    _penalize(logits_ptr, count_ptr, output_ptr, output_width, vocab, presence, frequency, repetition, BLOCK)


@apply_penalties.backend("triton")
def launch(logits: Tensor, prompt_ids: Tensor, output_ids: Tensor, presence_penalty: Tensor, frequency_penalty: Tensor,
           repetition_penalty: Tensor) -> None:
    rows, vocab = logits.shape
    widths = prompt_ids.shape[1], output_ids.shape[1]
    if rows * vocab * sum(widths) == 0:
        return
    counts = torch.empty((rows, vocab), dtype=torch.int32, device=logits.device)
    _apply_penalties_kernel[(rows,)](logits, prompt_ids, output_ids, presence_penalty, frequency_penalty,
                                     repetition_penalty, counts, logits.stride(0), vocab, *widths, BLOCK=BLOCK,
                                     num_warps=num_warps(BLOCK))
