"""Draws the next token of every sequence."""

import torch
from torch import Tensor

from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES

#: The fp32 number next to 1, towards 0.
BELOW_ONE = 1.0 - 2.0**-24


def _draw(rows: int, vocab: int, temperature: float | list[float] = 1.0, top_k: int | list[int] = 0,
          top_p: float | list[float] = 1.0, min_p: float | list[float] = 0.0, dtype=torch.float32, spread=3.0):
    """Every setting is one value for all rows or a list of one per row."""

    def each(value, dtype=torch.float32):
        return torch.tensor(value, dtype=dtype).expand(rows).contiguous()

    return dict(logits=torch.randn(rows, vocab).mul_(spread).to(dtype), temperature=each(temperature),
                top_k=each(top_k, torch.int32), top_p=each(top_p), min_p=each(min_p), uniform=torch.rand(rows))


def _with_logits(drawn, logits):
    return drawn | {"logits": logits}


def _broken_rows():
    """NaN here and there, NaN everywhere, one allowed token, none allowed, an infinite logit."""
    drawn = _draw(10, 1003, [1.0, 0.0] * 5, 40, 0.9, 0.01)
    logits = drawn["logits"]
    logits[:2, ::3] = torch.nan
    logits[2:4] = torch.nan
    logits[4:6] = -torch.inf
    logits[4:6, 777] = -5.0
    logits[6:8] = -torch.inf
    logits[8:, 5] = torch.inf
    return drawn


def _edges_of_uniform():
    return _draw(4, 1000, 0.7) | {"uniform": torch.tensor([0.0, 1.0 - 2.0**-24, 2.0**-24, 0.5])}


def _uniform_of_one():
    """What a generator's value below 1 is rounded to, on every path: all kept, top_k, top_p, min_p, greedy, one."""
    drawn = _draw(6, 1003, [0.7, 0.7, 0.7, 0.7, 0.0, 1.0], [0, 30, 0, 0, 0, 1], [1.0, 1.0, 0.9, 1.0, 0.9, 1.0],
                  [0.0, 0.0, 0.0, 0.1, 0.0, 0.0])
    return drawn | {"uniform": torch.ones(6)}


def _hot(dtype):
    """Temperatures that no difference of logits survives, and masked logits, which stay masked."""
    top_p = [1.0, 1.0, 1.0, 0.9, 0.5, 0.9]
    drawn = _draw(6, 4097, [torch.inf, 1e37, 3e38, torch.inf, 1e38, 1e36], [0, 0, 0, 0, 40, 0], top_p, dtype=dtype)
    drawn["logits"][:, ::3] = -torch.inf
    drawn["logits"][0] = -torch.inf
    drawn["logits"][0, 4096] = 0.0
    return drawn | {"uniform": torch.tensor([0.1, 0.0, 0.999, 0.3, 0.6, 0.9])}


def cases():
    for dtype in DTYPES:
        yield Case(f"plain-{dtype}", lambda d=dtype: _draw(3, 4099, [1.0, 0.3, 1.7], dtype=d))
        yield Case(f"top-k-top-p-{dtype}", lambda d=dtype: _draw(2, 1500, 0.8, [50, -1], [0.95, 0.8], dtype=d))
    yield Case("mixed", lambda: _draw(5, 1000, [0.0, 1.0, 1.3, 0.6, 1.0], [50, 50, 1, 7, 1000],
                                      [0.9, 0.95, 1.0, 0.5, 0.7], [0.0, 0.05, 0.0, 0.2, 0.0]))
    yield Case("greedy", lambda: _draw(5, 3001, 0.0))
    yield Case("greedy-ties", lambda: _with_logits(_draw(4, 2000, 0.0), torch.randint(-2, 3, (4, 2000)).float()))
    yield Case("one", lambda: _draw(1, 1, 1.0, 5, 0.5))
    yield Case("empty", lambda: _draw(0, 100))
    yield Case("top-k-of-ties", lambda: _with_logits(_draw(4, 1200, 1.0, [1, 10, 100, 5000]),
                                                     torch.randint(-9, 10, (4, 1200)).float()))
    yield Case("top-p-of-ties", lambda: _with_logits(_draw(4, 1200, 2.0, 0, [0.0, 0.33, 0.66, 0.999]),
                                                     torch.randint(-9, 10, (4, 1200)).float()))
    yield Case("top-p-zero", lambda: _draw(3, 1000, 1.0, 0, 0.0))
    yield Case("min-p", lambda: _draw(3, 1000, [0.5, 1.0, 5.0], 0, 1.0, [0.1, 1.0, 0.02]))
    yield Case("flat", lambda: _with_logits(_draw(3, 1024, 1.0, [0, 3, 0], [1.0, 1.0, 0.5]), torch.zeros(3, 1024)))
    yield Case("wide-nucleus", lambda: _draw(2, 20011, 1.0, [0, 15000], [0.8, 0.9], spread=0.5))
    yield Case("sharp", lambda: _draw(3, 1000, 1e-4, 0, 0.9))
    yield Case("far-apart", lambda: _draw(3, 1000, 1.0, [0, 100, 0], [1.0, 1.0, 0.9], spread=1e4))
    yield Case("broken-rows", _broken_rows)
    yield Case("edges-of-uniform", _edges_of_uniform)
    yield Case("uniform-of-one", _uniform_of_one)
    yield Case("hot", lambda: _hot(torch.float32))
    yield Case("hot-bf16", lambda: _hot(torch.bfloat16))
    yield Case("strided", lambda: _with_logits(_draw(3, 1000, 1.0, 20, 0.9), torch.randn(3, 1101)[:, 50:1050] * 4))
    for rows in (1, 128):
        yield Case(f"{rows}x128256-greedy", lambda b=rows: _draw(b, 128256, 0.0), large=True)
        yield Case(f"{rows}x128256", lambda b=rows: _draw(b, 128256, 0.8), large=True)
        yield Case(f"{rows}x128256-top-p", lambda b=rows: _draw(b, 128256, 0.8, 0, 0.95), large=True)
        yield Case(f"{rows}x128256-top-k-top-p", lambda b=rows: _draw(b, 128256, 0.8, 50, 0.95, 0.02), large=True)


def check(logits, temperature, top_k, top_p, min_p, uniform):
    if logits.ndim != 2 or logits.shape[1] == 0 or (logits.stride(1) != 1 and logits.shape[1] > 1):
        raise BadArgument("logits", "[num_seqs, vocab] with a contiguous last dimension and a vocabulary", logits)
    if logits.dtype not in DTYPES:
        raise BadArgument("logits", "bf16, fp16 or fp32", logits)
    rows = logits.shape[:1]
    if top_k.shape != rows or top_k.dtype != torch.int32 or not top_k.is_contiguous():
        raise BadArgument("top_k", f"contiguous int32 {list(rows)}, one value per row of logits", top_k)
    for x in (temperature, top_p, min_p, uniform):
        if x.shape != rows or x.dtype != torch.float32 or not x.is_contiguous():
            names = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "uniform": uniform}
            name = next(n for n, tensor in names.items() if tensor is x)
            raise BadArgument(name, f"contiguous float32 {list(rows)}, one value per row of logits", x)


def clean(logits: Tensor) -> Tensor:
    """Logits in at least fp32, NaN as -inf and +inf as the largest number."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.nan_to_num(-torch.inf, torch.finfo(wide.dtype).max, -torch.inf)


def best_of(wide: Tensor) -> Tensor:
    """Each row's maximum [B, 1], finite even where nothing is."""
    return wide.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide.dtype).min)


def weight_of(wide: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """exp((wide - best) / temperature), of greedy rows at temperature 1; `best` is each row's maximum [B, 1]. An
    infinite temperature counts as the largest number, so that -inf stays -inf."""
    temperature = temperature.clamp(max=torch.finfo(torch.float32).max)
    return (wide - best).div_(torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)).exp_()


def threshold_of(wide: Tensor, weight: Tensor, best: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
               width: int) -> tuple[Tensor, Tensor]:
    """The smallest logit [B, 1] that top_k, then top_p of what remains, keep, found among the `width` largest; and the
    rows [B, 1] for which these were enough to tell."""
    vocab, top_p = wide.shape[1], top_p.unsqueeze(1)
    ordered = wide.topk(width).values
    count = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).unsqueeze(1)
    found = count <= width
    kth = torch.where(found, ordered.gather(1, count.clamp(max=width) - 1), -torch.inf)
    want = top_p * weight.masked_fill(wide < kth, 0.0).sum(-1, keepdim=True)
    running = weight_of(ordered, best, temperature).masked_fill_(ordered < kth, 0.0).cumsum(-1)
    # a token stays while the mass before it is below top_p of all, the first one always
    stay = 1 + (running[:, :-1] < want).sum(-1, keepdim=True)
    threshold = torch.where(top_p < 1, ordered.gather(1, stay - 1).maximum(kth), kth)
    return threshold, found | ((count == vocab) & ((top_p >= 1) | (running[:, -1:] >= want)))


def draw(wide: Tensor, weight: Tensor, kept: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """The first kept id at which the running sum of weights exceeds uniform times their sum; greedy rows: the best."""
    running = weight.masked_fill(~kept, 0.0).cumsum(-1)
    hit = (running > uniform.clamp(max=BELOW_ONE).unsqueeze(1) * running[:, -1:]) & kept
    drawn = (temperature > 0) & hit.any(-1)
    return torch.where(drawn, hit.to(torch.uint8).argmax(-1), wide.argmax(-1))


def agree(args: dict[str, Tensor], result: Tensor, exact: Tensor) -> None:
    """Raises AssertionError unless each id is one that a computation in fp32 may draw.

    Rows that do not draw: the very id. Others: the id is kept and its interval of the running sum holds `uniform`, give
    or take the rounding of weights and sums. Where a logit is on the edge of top_p or min_p within that, either side.
    """
    vocab = args["logits"].shape[1]
    if result.dtype != torch.int64 or result.shape != exact.shape or ((result < 0) | (result >= vocab)).any():
        raise AssertionError(f"expected int64 {list(exact.shape)} in [0, {vocab}), got {result}")
    wide = clean(args["logits"])
    best = best_of(wide)
    weight, eps = weight_of(wide, best, args["temperature"]), torch.finfo(torch.float32).eps
    # in exp the rounding of the argument z, |z| eps, becomes a relative error; sums add a rounding per block
    spread = -torch.special.xlogy(weight, weight).sum(-1) / weight.sum(-1).clamp(min=1.0)
    off = (eps * (spread + 32 + vocab / 512)).unsqueeze(1)
    ids, allowed = result.unsqueeze(1), (result == exact)
    for shift in (-1.0, 0.0, 1.0):
        top_p = torch.where(args["top_p"] < 1, args["top_p"] + shift * off[:, 0], args["top_p"])
        threshold, _ = threshold_of(wide, weight, best, args["temperature"], args["top_k"], top_p, vocab)
        for tilt in (-1.0, 0.0, 1.0):
            edge = (1 + 128 * tilt * eps) * args["min_p"].clamp(max=1.0).unsqueeze(1)
            kept = (wide >= threshold) & (weight >= edge.clamp(max=1.0))
            running = (weight * kept).cumsum(-1)
            running = running / running[:, -1:]
            high = running.gather(1, ids)
            low = high - (weight * kept).gather(1, ids) / (weight * kept).sum(-1, keepdim=True)
            inside = (low - off <= args["uniform"].unsqueeze(1)) & (args["uniform"].unsqueeze(1) <= high + off)
            allowed |= (kept.gather(1, ids) & inside)[:, 0] & (args["temperature"] > 0)
    if not allowed.all():
        raise AssertionError(f"rows {(~allowed).nonzero()[:, 0].tolist()}: expected {exact[~allowed].tolist()} or a "
                             f"neighbor within rounding, got {result[~allowed].tolist()}")


@op(cases=cases, check=check, agree=agree, fake=lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64),
    cost=lambda logits, temperature, top_k, top_p, min_p, uniform: Cost(bytes=logits.nbytes))
def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Sample one id per row by inversion: the first id, in vocabulary order, at which the cumulative sum of the kept
    probabilities exceeds uniform times their sum. With p = softmax(logits / temperature), three filters apply in turn:
      top_k keeps the top_k largest                                            (Fan et al. 2018)
      top_p keeps the smallest set of the largest that sums to at least top_p  (Holtzman et al. 2019)
      min_p keeps those with p >= min_p * max(p)                               (Nguyen et al. 2024).
    Ties with the smallest kept probability are kept, and the largest is always kept. A row with temperature 0 gets the
    lowest index of its maximum, and so does a row of -inf only. NaN counts as -inf.

    logits       [num_seqs, vocab]  bf16, fp16 or fp32; last dim contiguous, rows may be strided
    temperature  [num_seqs]         fp32; <= 0 is greedy, infinity makes all ids equally likely except those at -inf
    top_k        [num_seqs]         int32; <= 0 keeps all
    top_p        [num_seqs]         fp32; >= 1 keeps all
    min_p        [num_seqs]         fp32; <= 0 keeps all
    uniform      [num_seqs]         fp32 in [0, 1); 1, to which a generator may round, gives the last kept id
    returns      [num_seqs]         int64 ids in [0, vocab)
    raises       BadArgument (a ValueError) for other shapes or dtypes
    """
    wide, vocab = clean(logits), logits.shape[1]
    best = best_of(wide)
    weight = weight_of(wide, best, temperature)
    threshold, _ = threshold_of(wide, weight, best, temperature, top_k, top_p, vocab)
    return draw(wide, weight, (weight >= min_p.clamp(max=1.0).unsqueeze(1)) & (wide >= threshold), temperature, uniform)
