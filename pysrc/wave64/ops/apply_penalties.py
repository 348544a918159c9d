"""Presence, frequency and repetition penalties on the logits, in place."""

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES


def _draw(rows, vocab, prompt, output, dtype=torch.float32, distinct=None):
    """Rows of ids of random length up to `prompt` and `output`, padded with -1; `distinct` different ones at most."""

    def ids(width):
        drawn = torch.randint(min(vocab, distinct or vocab), (rows, width))
        return drawn.masked_fill_(torch.arange(width) >= torch.randint(width + 1, (rows, 1)), -1)

    return dict(logits=(torch.randn(rows, vocab) * 4).to(dtype), prompt_ids=ids(prompt), output_ids=ids(output),
                presence_penalty=torch.rand(rows) * 4 - 2, frequency_penalty=torch.rand(rows) * 4 - 2,
                repetition_penalty=torch.rand(rows) + 0.5)


def _strided():
    return _draw(3, 900, 20, 10) | {"logits": torch.randn(3, 1000)[:, 37:937]}


def _infinite():
    drawn = _draw(3, 1000, 30, 30, distinct=8)
    drawn["logits"][:, ::2] = -torch.inf
    return drawn


def _all_padding():
    return _draw(2, 1000, 0, 0) | {"prompt_ids": torch.full((2, 4), -1), "output_ids": torch.full((2, 3), -1)}


def _one_past_a_block():
    """1025 tokens and no padding: where a block takes 1024, the last one is alone in the last block."""
    return _draw(2, 9001, 0, 0) | {side: torch.stack([torch.randperm(9001)[:1025] for _ in range(2)])
                                   for side in ("prompt_ids", "output_ids")}


def cases():
    for dtype in DTYPES:
        yield Case(f"3x1009-{dtype}", lambda d=dtype: _draw(3, 1009, 17, 9, d))
        yield Case(f"repeats-{dtype}", lambda d=dtype: _draw(4, 500, 40, 300, d, distinct=5))
        yield Case(f"slices-{dtype}", lambda d=dtype: _draw(1, 2064, 5120, 1040, d))
    yield Case("many-ids", lambda: _draw(2, 9001, 5000, 2000))
    yield Case("one-past-a-block", _one_past_a_block)
    yield Case("no-prompt", lambda: _draw(2, 1000, 0, 5))
    yield Case("no-output", lambda: _draw(2, 1000, 5, 0))
    yield Case("neither", lambda: _draw(2, 1000, 0, 0))
    yield Case("all-padding", _all_padding)
    yield Case("empty", lambda: _draw(0, 1000, 4, 4))
    yield Case("one", lambda: _draw(1, 1, 3, 3))
    yield Case("strided", _strided)
    yield Case("infinite", _infinite)
    for rows, prompt, output in [(1, 1024, 256), (128, 1024, 1024), (8, 32768, 2048)]:
        yield Case(f"{rows}x128256-{prompt}+{output}",
                   lambda b=rows, p=prompt, o=output: _draw(b, 128256, p, o), large=True)


def check(logits, prompt_ids, output_ids, presence_penalty, frequency_penalty, repetition_penalty):
    if logits.ndim != 2 or not logits.shape[1] or (logits.stride(1) != 1 and logits.shape[1] > 1):
        raise BadArgument("logits", "[num_seqs, vocab] with vocab at least 1 and a contiguous last dimension", logits)
    if logits.dtype not in DTYPES:
        raise BadArgument("logits", "bf16, fp16 or fp32", logits)
    rows = logits.shape[0]
    for name, ids in (("prompt_ids", prompt_ids), ("output_ids", output_ids)):
        if ids.ndim != 2 or ids.shape[0] != rows or ids.dtype != torch.int64 or not ids.is_contiguous():
            raise BadArgument(name, f"contiguous int64 [{rows}, any], padded with -1", ids)
    for x in (presence_penalty, frequency_penalty, repetition_penalty):
        if x.ndim != 1 or x.shape[0] != rows or x.dtype != torch.float32 or not x.is_contiguous():
            names = {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
                     "repetition_penalty": repetition_penalty}
            name = next(n for n, tensor in names.items() if tensor is x)
            raise BadArgument(name, f"contiguous float32 [{rows}], one value per row of logits", x)


def cost(logits, prompt_ids, output_ids, presence_penalty, frequency_penalty, repetition_penalty):
    ids = prompt_ids.numel() + output_ids.numel()
    return Cost(bytes=ids * 8 + 2 * min(ids, logits.numel()) * logits.element_size())


@op(cases=cases, check=check, cost=cost, mutates=("logits",))
def apply_penalties(logits: Tensor, prompt_ids: Tensor, output_ids: Tensor, presence_penalty: Tensor,
                    frequency_penalty: Tensor, repetition_penalty: Tensor) -> None:
    """Penalize the logits of tokens that the prompt or the output contains, in place; in fp32, rounded once:
      in prompt or output  l = l / repetition_penalty if l > 0 else l * repetition_penalty   (Keskar et al. 2019)
      in output            l -= frequency_penalty * count_in_output + presence_penalty       (OpenAI's definition)

    logits                    [num_seqs, vocab]  bf16, fp16 or fp32; last dim contiguous, rows may be strided; written
    prompt_ids, output_ids    [num_seqs, any]    int64 in [0, vocab), not checked; padded with -1
    presence_penalty          [num_seqs]  fp32; 0 changes nothing
    frequency_penalty         [num_seqs]  fp32; 0 changes nothing
    repetition_penalty        [num_seqs]  fp32; 1 changes nothing
    raises                    BadArgument (a ValueError) for other shapes or dtypes
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, output_ids.clamp(min=0), (output_ids >= 0).to(torch.int32))
    # Only the seen tokens are touched. Padding stands for id 0: it writes what is right for it, seen or not.
    ids = torch.cat([prompt_ids, output_ids], 1)
    seen = (ids >= 0) | (ids == 0).any(-1, keepdim=True)
    ids = ids.clamp_(min=0)
    count, logit = counts.gather(1, ids), logits.gather(1, ids).to(wide)
    repetition = repetition_penalty.unsqueeze(1)
    logit = torch.where(seen, torch.where(logit > 0, logit / repetition, logit * repetition), logit)
    logit = logit - (frequency_penalty.unsqueeze(1) * count + presence_penalty.unsqueeze(1) * (count > 0))
    logits.scatter_(1, ids, logit.to(logits.dtype))
