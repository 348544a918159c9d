"""What ranks.py times next to all_reduce: torch's collectives on symmetric memory, norms of sums by each protocol."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from wave64 import distributed, ops
from wave64.backends import peers


def symmetric(group: str, n: int) -> dict[str, Callable[[], Any]]:
    """torch's sums of n elements of bf16, by name."""
    import torch.distributed._symmetric_memory as symm_mem

    name = distributed.registered(group).group_name
    x = symm_mem.empty(n, dtype=torch.bfloat16, device=torch.device("cuda"))
    symm_mem.rendezvous(x, name)
    x.zero_()
    torch.cuda.synchronize()
    torch.distributed.barrier()
    return {"symm_mem one-shot": lambda: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", name),
            "symm_mem two-shot": lambda: torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", name)}


def normed(group: str, x: Tensor, residual: Tensor, weight: Tensor, protocol: int | None) -> Tensor:
    """The norm of the sum; None: by the protocol that is chosen."""
    ranks = peers.of(group)
    by = ranks.norm_protocol(x.nbytes) if protocol is None else protocol
    with mock.patch.object(ranks, "norm_protocol", return_value=by):
        return ops.fused_all_reduce_rms_norm(x, residual, weight, 1e-5, group)
