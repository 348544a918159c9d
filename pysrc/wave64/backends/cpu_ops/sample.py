"""Sampling on a CPU: looking at the settings costs nothing there and saves most of the work.

Greedy batches are an argmax; top_k and top_p are found among the 256 largest logits where these are enough to tell.
"""

from torch import Tensor

from wave64 import ops
from wave64.ops.sample import best_of, clean, draw, threshold_of, weight_of


@ops.sample.backend("cpu")
def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    wide, vocab = clean(logits), logits.shape[1]
    if not (temperature > 0).any():
        return wide.argmax(-1)
    best = best_of(wide)
    weight = weight_of(wide, best, temperature)
    kept = weight >= min_p.clamp(max=1.0).unsqueeze(1)
    if ((top_k > 0) | (top_p < 1)).any():
        for width in (min(256, vocab), vocab):
            threshold, enough = threshold_of(wide, weight, best, temperature, top_k, top_p, width)
            if enough.all():
                break
        kept &= wide >= threshold
    return draw(wide, weight, kept, temperature, uniform)
