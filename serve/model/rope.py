"""Rotary position embedding: the inverse frequencies of each rope type, and the table of cosines and sines they give.

Pure mathematics on small fp32 tensors, once per model. The rotation itself is `wave64.ops.rotary_embedding`.
Frequencies and angles are fp32 products on purpose: that is what the published models were trained with, and at a
position of 100,000 a more exact product would change the angle of the fastest pair visibly.
"""

import math

import torch
from torch import Tensor

from wave64.serve.model.config import RopeConfig


def cos_sin_cache(rope: RopeConfig, head_dim: int, length: int) -> Tensor:
    """The table `rotary_embedding` reads: [length, head_dim] fp32, cos then sin, row p for position p.

    Every type but `dynamic` has the same frequencies at all positions. `dynamic` (NTK-aware scaling) derives them
    from the length of the sequence so far. In a server that length must not be that of another sequence, nor depend
    on how a prompt was cut in chunks, so row p holds the frequencies of the sequence that ends with p: those of the
    trained context up to there, stretched ones beyond. Up to the trained context, and beyond it while generating,
    this is what transformers computes; it differs only for a prompt that is itself longer than the trained context,
    to all of which transformers applies the frequencies of the whole prompt, if it gets it in one piece.
    """
    positions = torch.arange(length, dtype=torch.float32, device="cpu")
    if rope.rope_type == "dynamic":
        lengths = (positions + 1).clamp(min=rope.original_max_position_embeddings).unsqueeze(1)
        base = _ntk_base(rope, head_dim, lengths)
        frequencies, scale = 1.0 / base ** _exponents(head_dim), 1.0
    else:
        frequencies, scale = inverse_frequencies(rope, head_dim)
    angles = positions.unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, [head_dim / 2] fp32, and the factor on cosines and sines.

    For `dynamic`: those of a sequence within the trained context.
    """
    plain = 1.0 / rope.theta ** _exponents(head_dim)
    if rope.rope_type == "linear":
        return plain / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, plain, head_dim), _yarn_attention_factor(rope)
    return plain, 1.0


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim


def _ntk_base(rope: RopeConfig, head_dim: int, lengths: Tensor) -> Tensor:
    """theta raised so that the slowest pair rotates as far over `lengths` as it did over the trained context."""
    stretch = rope.factor * lengths / rope.original_max_position_embeddings - (rope.factor - 1)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Slow pairs slowed down by the factor, fast ones kept, a ramp between (Llama 3.1, Grattafiori et al. 2024)."""
    rotations = rope.original_max_position_embeddings * plain / (2 * math.pi)  # over the trained context
    ramp = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(plain / rope.factor, plain, ramp.clamp(0, 1))


def _yarn(rope: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """As llama3, with the ramp linear in the pair's index (YaRN, Peng et al. 2023, section 3.2)."""

    def pair_that_rotates(times: float) -> float:
        wavelength = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_that_rotates(rope.beta_fast), pair_that_rotates(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return torch.lerp(plain, plain / rope.factor, ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Softens attention over longer contexts (YaRN, section 3.4); mscale is DeepSeek's extension of it."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
