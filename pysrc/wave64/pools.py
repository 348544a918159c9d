"""Pools beyond 2 GiB as cases have them: memory with a few pages are in use, and no other is ever touched."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from wave64.op import Case

GIB = 2**30
#: Rows in use at each place that matters.
AT_EACH = 8


def rows_in_use(pool: Tensor) -> list[int]:
    """Of a sparse pool, the numbers along its first dimension whose memory is in use: the first, those around the byte
    and the element that need a 32nd and a 33rd bit, and the last; one of each place in turn."""
    rows, row = pool.shape[0], pool.stride(0)
    borders = {2**bits // size - 1 for bits in (31, 32) for size in (row, row * pool.element_size())}
    firsts = [0, *sorted(first for first in borders if first + 2 * AT_EACH <= rows), rows - AT_EACH]
    return [first + i for i in range(AT_EACH) for first in firsts]


def spread(args: dict[str, Any], pools: Iterable[str], size: int, page_size: int = 1, tables: Iterable[str] = (),
           slots: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments with each of `pools`, of few rows and alike in shape, spread over a pool of `size` bytes and a row,
    and the numbers of rows in `tables` and of slots, row * page_size + offset, in `slots` changed accordingly. Rows in
    use that have nothing of the small pool hold NaN; what is no row or slot of it stays as it is."""
    changed = dict(args)
    for name in pools:
        few = args[name].contiguous()
        pool = torch.empty(size // few[0].nbytes + 1, *few.shape[1:], dtype=few.dtype)
        rows, count = rows_in_use(pool), few.shape[0]
        if count > len(rows):
            raise ValueError(f"{name}: expected at most {len(rows)} rows to spread, got {count}")
        held = torch.full((len(rows), *few.shape[1:]), float("nan")).to(few.dtype).view(torch.uint8)
        held[:count] = few.view(torch.uint8)
        pool.view(torch.uint8)[rows] = held
        changed[name] = pool
        numbers = torch.tensor(rows[:count])
    for name, length in [*((name, 1) for name in tables), *((name, page_size) for name in slots)]:
        given = args[name]
        inside = (given >= 0) & (given < count * length)
        row = numbers[torch.where(inside, given, 0).long() // length]
        changed[name] = torch.where(inside, row * length + given % length, given).to(given.dtype)
    return changed


def cases(make: Callable[..., dict[str, Any]], pools: tuple[str, ...], tables: Iterable[str] = (),
          slots: Iterable[str] = ()) -> Iterator[Case]:
    """Cases of make(page_size=, fp8=), which draws arguments with pools of at most 24 pages, with those spread: beyond
    2 GiB in the operator's dtype, and in FP8 beyond 2**32 bytes and elements."""
    for page_size in (16, 64):
        for fp8, size in ((False, 3 * GIB), (True, 5 * GIB)):
            def drawn(page_size=page_size, fp8=fp8, size=size):
                return spread(make(page_size=page_size, fp8=fp8), pools, size, page_size, tables, slots)

            yield Case(f"pool-{size // GIB}gib-page-{page_size}{'-fp8' if fp8 else ''}", drawn, sparse=pools)
