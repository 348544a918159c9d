"""Copies rows between KV pools: on one device, or between a GPU and pinned host memory."""

import torch
from torch import Tensor

from wave64 import pools, quant
from wave64.op import BadArgument, Case, Cost, op
from wave64.ops.rms_norm import DTYPES

POOLS = ("src", "dst")
#: Slots that no pool has: (which pool, slot).
OUTSIDE = ((0, -1), (1, -1), (1, 2**40), (0, 2**60), (0, -2), (1, -2**40))


def _draw(n, src_slots, dst_slots, row, dtype=torch.bfloat16, skip=()):
    """Pairs drawn without repetition; `skip` of them are left out."""
    pools = [torch.randn(slots, *row).to(dtype) for slots in (src_slots, dst_slots)]
    slots = [torch.randperm(pool.shape[0])[:n] for pool in pools]
    for pair, (which, number) in zip(skip, OUTSIDE, strict=False):
        slots[which][pair] = number
    return dict(src=pools[0], dst=pools[1], src_slots=slots[0], dst_slots=slots[1])


def _strided():
    """Every layer's rows of a token lie together in one pool, each layer's alone in the other."""
    drawn = _draw(5, 9, 7, (3, 2, 64))
    return drawn | dict(src=drawn["src"][:, 1], dst=drawn["dst"][:, 0].contiguous())


def cases():
    for dtype in (*DTYPES, *quant.FP8.values()):
        yield Case(f"tokens-{dtype}", lambda d=dtype: _draw(7, 40, 12, (2, 64), d, skip=(0, 3)))
        yield Case(f"odd-{dtype}", lambda d=dtype: _draw(5, 6, 11, (3, 7), d, skip=(1, 4, 0)))
    yield Case("int64", lambda: _draw(4, 5, 6, (8,), torch.int64))
    yield Case("numbers", lambda: _draw(70, 90, 80, (), skip=(1, 2, 3, 4, 5, 6)))
    yield Case("pages", lambda: _draw(3, 4, 5, (16, 2, 128)))
    yield Case("one-of-many", lambda: _draw(1, 32, 48, (8, 128)))
    yield Case("batch", lambda: _draw(16, 32, 48, (8, 128)))
    yield Case("batch-of-pages", lambda: _draw(16, 32, 16, (16, 2, 128)))
    yield Case("strided", _strided)
    yield Case("one", lambda: _draw(1, 1, 1, (576,)))
    yield Case("none-counts", lambda: _draw(4, 5, 5, (32,), skip=(0, 1, 2, 3)))
    yield Case("no-pairs", lambda: _draw(0, 5, 5, (32,)))
    yield Case("no-slots", lambda: _draw(3, 5, 5, (32,)) | dict(dst=torch.zeros(0, 32, dtype=torch.bfloat16)))
    for kind, row in (("slots", (2, 64)), ("pages", (16, 2, 64))):
        for dtype, size in ((torch.bfloat16, 3), (quant.FP8["e4m3fn"], 5)):
            yield Case(f"pool-{size}gib-{kind}-{dtype}", lambda r=row, d=dtype, n=size: pools.spread(
                _draw(9, 12, 12, r, d, skip=(0, 3, 5)), POOLS, n * pools.GIB, slots=("src_slots", "dst_slots")),
                sparse=POOLS)
    for n, row in [(1, (8, 128)), (128, (8, 128)), (4096, (8, 128)), (8192, (576,)), (64, (64, 8, 128))]:
        yield Case(f"{n}x{'x'.join(map(str, row))}", lambda n=n, r=row: _draw(n, 8192, 8192, r), large=True)


def device_of(src, dst, src_slots, dst_slots) -> Tensor:
    """The pool on whose device the call runs: of two devices, the one that is not the host."""
    return dst if src.device.type == "cpu" else src


def _is_dense(pool: Tensor) -> bool:
    return pool.ndim > 0 and (pool.numel() == 0 or pool[0].is_contiguous())


def check(src, dst, src_slots, dst_slots):
    if not _is_dense(src):
        raise BadArgument("src", "[num_slots, ...], each slot contiguous", src)
    if not _is_dense(dst) or dst.shape[1:] != src.shape[1:] or dst.dtype != src.dtype:
        expected = f"{src.dtype} [num_slots, {', '.join(map(str, src.shape[1:]))}], rows as in src, each contiguous"
        raise BadArgument("dst", expected, dst)
    device = device_of(src, dst, src_slots, dst_slots).device
    for name, pool in (("src", src), ("dst", dst)):
        if pool.device != device and not (pool.device.type == "cpu" and pool.is_pinned()):
            raise BadArgument(name, f"on {device}, as the other pool, or in pinned host memory", pool)
    for name, slots in (("src_slots", src_slots), ("dst_slots", dst_slots)):
        if slots.shape != (src_slots.numel(),) or slots.dtype != torch.int64 or not slots.is_contiguous():
            raise BadArgument(name, f"contiguous int64 [{src_slots.numel()}], one for each pair", slots)
        if slots.device != device:
            raise BadArgument(name, f"on {device}, where the pool is that is not the host's", slots)


def cost(src, dst, src_slots, dst_slots) -> Cost:
    row = src[:1].numel() * src.element_size()
    return Cost(bytes=src_slots.numel() * (2 * row + 16))


def _rows(pool: Tensor) -> Tensor:
    """A view as bytes, [num_slots, row]: torch cannot index FP8."""
    return pool.as_strided((pool.shape[0], pool[0].numel()), (pool.stride(0), 1)).view(torch.uint8)


@op(cases=cases, check=check, cost=cost, mutates=("dst",), fake=lambda *_, **__: None, device_of=device_of)
def transfer_kv(src: Tensor, dst: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    """Copy slots between two KV pools: dst[dst_slots[i]] = src[src_slots[i]] for every i, bit for bit. Pairs with a
    slot outside of its pool, such as -1, are skipped.

    src        [num_src_slots, ...]  any dtype; each slot contiguous, slots may be strided. A slot is a page of a pool
               of pages, or a token of pool.flatten(0, 1)
    dst        [num_dst_slots, ...]  dtype and row shape of src; each slot contiguous, slots may be strided; written
    src_slots  [n]  int64
    dst_slots  [n]  int64; no slot twice among the pairs that are not skipped
    raises     BadArgument (a ValueError) for other shapes, dtypes, strides or devices

    One of the pools may be in pinned host memory, with the other and the slots on a GPU, which then accesses host
    memory itself, in stream order like any kernel. src and dst may be one pool if no slot is both read and written.
    """
    if src_slots.numel() == 0 or src.numel() == 0 or dst.numel() == 0:
        return
    counts = (src_slots >= 0) & (src_slots < src.shape[0]) & (dst_slots >= 0) & (dst_slots < dst.shape[0])
    # A pair that is left out repeats one that counts: the same row to the same slot, so order cannot matter and no
    # shape depends on data. Where none counts a row of dst is written with what it holds.
    some, kept = counts.to(torch.uint8).max(0)
    pairs = torch.where(counts, torch.arange(counts.numel(), device=counts.device), kept)
    source = src_slots.index_select(0, pairs).clamp(0, src.shape[0] - 1).to(src.device)
    target = dst_slots.index_select(0, pairs).clamp(0, dst.shape[0] - 1).to(dst.device)
    rows = _rows(dst)
    new = _rows(src).index_select(0, source).to(dst.device)
    rows.index_copy_(0, target, torch.where(some.bool().to(dst.device), new, rows.index_select(0, target)))
