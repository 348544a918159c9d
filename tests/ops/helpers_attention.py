"""What the tests of the attention operators share: loops over keys in fp64, and what hypothesis draws."""

import math

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from wave64 import OPS

#: Weights and results are rounded to the dtype, once each, and neither is above 1 (relative to the largest value).
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
#: Few and not shrunk: under the interpreter an example takes half a second.
drawn = settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
                 suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = st.fixed_dictionaries(dict(
    kv_heads=st.integers(1, 3), head_dim=st.sampled_from([8, 16, 24, 33, 64, 80]),
    page_size=st.sampled_from([1, 3, 16, 64]), dtype=st.sampled_from(list(TOLERANCE)), sinks=st.booleans(),
    fp8=st.booleans(), per_head=st.booleans(), sliding_window=st.sampled_from([-1, -1, 1, 5, 33]),
    logit_cap=st.sampled_from([0.0, 0.0, 2.0, 30.0])))
groups = st.sampled_from([1, 2, 3, 4, 7])
HEADS = [1, 3, 8, 12, 16, 20, 32, 64, 128]
PAGE_SIZES = [1, 16, 32, 64, 128]
#: kv_lora_rank and rope_dim, rope_dim even as rotation needs it; under the interpreter DeepSeek's 512 are slow.
WIDTHS = [(16, 8), (21, 6), (37, 10), (64, 16), (100, 12), (128, 64)]
#: Pools whose strides are not those of their shape; one with padded rows, one with every other row.
STRIDED = {
    "padded": lambda pool: torch.cat([pool, pool[..., :3]], -1)[..., :pool.shape[-1]],
    "every-other-row": lambda pool: torch.stack([pool, pool], 2)[:, :, 0],
    "rows-before-pages": lambda pool: pool.transpose(0, 1).contiguous().transpose(0, 1),
}


def key_of(cache, table, position, head, scale=None):
    """One key (or value) of one sequence, in fp64."""
    page_size = cache.shape[1]
    stored = cache[int(table[position // page_size]), position % page_size, head].double()
    return stored if scale is None else stored * float(scale.flatten()[head if scale.numel() > 1 else 0])


def attend_one(query, keys, values, scale, logit_cap=0.0, sink=None):
    """softmax over lists of keys and values for one head of one token: (result, log of the sum of exponentials)."""
    logits = [scale * float(query.double() @ key) for key in keys]
    if logit_cap:
        logits = [logit_cap * math.tanh(x / logit_cap) for x in logits]
    everything = logits if sink is None else [*logits, float(sink)]
    if not everything:
        return torch.zeros_like(query, dtype=torch.float64), -math.inf
    top = max(everything)
    total = math.fsum(math.exp(x - top) for x in everything)
    out = torch.zeros_like(query, dtype=torch.float64)
    for x, value in zip(logits, values, strict=True):
        out += math.exp(x - top) / total * value
    return out, top + math.log(total)


def run(op, backend, args):
    declared = OPS[op].backends[backend]
    reason = declared.supports(**args) if declared.supports else None
    assert reason is None
    return declared.run(**args)


def assert_near(got, exact, args):
    """Errors are relative to the largest value that there is to mix."""
    largest = float(args["value_cache"].float().nan_to_num().abs().max())
    if args.get("v_scale") is not None:
        largest *= float(args["v_scale"].max())
    assert got.isfinite().all()
    torch.testing.assert_close(got.cpu().double(), exact, atol=TOLERANCE[got.dtype] * largest, rtol=0)


def latent_of(kv_cache, pages, position, kv_scale=None):
    """One latent of the sequence whose pages these are, in fp64."""
    page_size = kv_cache.shape[1]
    stored = kv_cache[int(pages[position // page_size]), position % page_size].double()
    return stored if kv_scale is None else stored * float(kv_scale)


def attend_over(query, latents, scale, rank):
    """One query [num_heads, width] over a list of latents: softmax's mixture and log of the sum of exponentials."""
    if not latents:
        return query.new_zeros(len(query), rank).double(), torch.full((len(query),), -math.inf, dtype=torch.float64)
    query = query.double()
    logits = torch.stack([scale * (query @ latent) for latent in latents])
    top = logits.max(0).values
    total = (logits - top).exp().sum(0)
    out = torch.zeros(len(query), rank, dtype=torch.float64)
    for row, latent in zip(logits, latents, strict=True):
        out += ((row - top).exp() / total)[:, None] * latent[:rank]
    return out, top + total.log()


def near(got, exact, kv_cache, kv_scale):
    """Errors are relative to the largest value that there is to mix."""
    largest = float(kv_cache.float().nan_to_num().abs().max()) * (1.0 if kv_scale is None else float(kv_scale))
    assert got.isfinite().all()
    torch.testing.assert_close(got.cpu().double(), exact, atol=TOLERANCE[got.dtype] * largest, rtol=0)


def draw_options(rng, heads):
    """A batch of few rows: the interpreter needs 10 ms for each row and 128 columns of a result put together."""
    rank, rope = rng.choice(WIDTHS)
    queries = rng.choice([0, 1, 2, 3, 4] if heads <= 16 else [0, 0, 1, 2] if heads <= 32 else [0])
    rows = heads * max(1, queries)
    longest = 300 if rows <= 48 else 40
    seq_lens = [rng.choice([rng.randint(0, 5), rng.randint(0, longest), rng.randint(0, longest)])
                for _ in range(rng.randint(1, max(1, min(4, 40 // rows))))]
    return dict(seq_lens=seq_lens, heads=heads, queries=queries, rank=rank, rope=rope,
                page_size=rng.choice(PAGE_SIZES), dtype=rng.choice(list(TOLERANCE)), fp8=rng.random() < 0.3)


def moved_far(args, page_size):
    """kv_cache and page_table of the same latents in the last pages of more than 2 GiB."""
    width, device = args["kv_cache"].shape[-1], args["kv_cache"].device
    pages = 2**31 // (page_size * width) + 8
    pool = torch.empty(pages, page_size, width, dtype=args["kv_cache"].dtype, device=device)
    used = sorted({int(p) for row, n in zip(args["page_table"], args["seq_lens"], strict=True)
                   for p in row[:-(-int(n) // page_size)]})
    last = {page: pages - 1 - i for i, page in enumerate(used)}
    for page, target in last.items():
        pool[target] = args["kv_cache"][page]
    table = args["page_table"].clone().cpu().apply_(lambda page: last.get(page, page))
    return dict(kv_cache=pool, page_table=table.to(device))
