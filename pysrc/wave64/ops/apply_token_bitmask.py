"""Mask the tokens that a grammar does not allow: their logits become -inf, in place."""

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES

WORD = 32


def _words(vocab: int) -> int:
    return -(-vocab // WORD)


def _draw(rows, vocab, allowed=0.5, dtype=torch.float32):
    """`allowed`: the fraction of tokens whose bit is 1. Bits behind the vocabulary are random, too."""
    bits = torch.rand(rows, _words(vocab), WORD) < allowed
    words = (bits.long() << torch.arange(WORD)).sum(-1)
    return dict(logits=torch.randn(rows, vocab).mul_(4).to(dtype), bitmask=words.to(torch.int32))


def _strided():
    drawn = _draw(3, 900)
    return {"logits": torch.randn(3, 1000)[:, 37:937], "bitmask": drawn["bitmask"].repeat(1, 2)[:, 5:34]}


def _broken_rows():
    """NaN and infinities, allowed and not."""
    drawn = _draw(3, 1000)
    drawn["logits"][0] = torch.nan
    drawn["logits"][1] = torch.inf
    drawn["logits"][2, ::3] = -torch.inf
    return drawn


def cases():
    for dtype in DTYPES:
        yield Case(f"4x4096-{dtype}", lambda d=dtype: _draw(4, 4096, dtype=d))
        yield Case(f"3x1009-{dtype}", lambda d=dtype: _draw(3, 1009, dtype=d))
        yield Case(f"few-allowed-{dtype}", lambda d=dtype: _draw(2, 5000, 0.01, d))
        yield Case(f"1x4128-{dtype}", lambda d=dtype: _draw(1, 4128, dtype=d))  # words no multiple of 16, logits one
    yield Case("all-allowed", lambda: _draw(2, 1000, 2.0))
    yield Case("none-allowed", lambda: _draw(2, 1000, -1.0))
    yield Case("empty", lambda: _draw(0, 1000))
    yield Case("one", lambda: _draw(1, 1))
    yield Case("strided", _strided)
    yield Case("broken-rows", _broken_rows)
    for rows in (1, 128):
        yield Case(f"{rows}x128256-few-allowed", lambda b=rows: _draw(b, 128256, 0.001), large=True)
        yield Case(f"{rows}x128256-most-allowed", lambda b=rows: _draw(b, 128256, 0.99), large=True)
    yield Case("128x128256-few-allowed-bf16", lambda: _draw(128, 128256, 0.001, torch.bfloat16), large=True)
    yield Case("128x128256-half-allowed", lambda: _draw(128, 128256), large=True)


def check(logits, bitmask):
    if logits.ndim != 2 or (logits.stride(1) != 1 and logits.shape[1] > 1):
        raise BadArgument("logits", "[num_seqs, vocab_size] with a contiguous last dimension", logits)
    if logits.dtype not in DTYPES:
        raise BadArgument("logits", "bf16, fp16 or fp32", logits)
    shape = [logits.shape[0], _words(logits.shape[1])]
    if list(bitmask.shape) != shape or bitmask.dtype != torch.int32 or (bitmask.stride(1) != 1 and shape[1] > 1):
        raise BadArgument("bitmask", f"int32 {shape} with a contiguous last dimension, a bit per token", bitmask)


@op(cases=cases, check=check, mutates=("logits",),
    cost=lambda logits, bitmask: Cost(bytes=bitmask.nbytes + logits.nbytes))  # most grammars mask nearly all logits
def apply_token_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    """Mask the tokens that a grammar does not allow, in place: logits[s, i] becomes -inf where the bit of token i is 0.
    That is bit i % 32, counted from the lowest, of bitmask[s, i // 32], as in xgrammar (Dong et al. 2024) and SGLang.
    Other logits do not change, NaN included.

    logits   [num_seqs, vocab_size]             bf16, fp16 or fp32; last dim contiguous, rows may be strided; written
    bitmask  [num_seqs, ceil(vocab_size / 32)]  int32; last dim contiguous; bits beyond the vocabulary are ignored
    raises   BadArgument (a ValueError) for other shapes or dtypes
    """
    bits = bitmask.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=bitmask.device) & 1
    logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)
