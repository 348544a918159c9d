"""What the tests of operators that apply RoPE and write a cache have in common."""

from typing import Any

import torch
from torch import Tensor

from wave64.op import Op
from wave64.testing import contract


def angles(positions: int, pairs: int) -> Tensor:
    """cos_sin_cache [positions, 2 * pairs], cosines then sines."""
    angle = torch.rand(positions, pairs) * 6
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [num_tokens, heads, dim] with pairs half of cos_sin's columns apart rotated by its rows; what is behind them
    stays."""
    pairs = cos_sin.shape[1] // 2
    cos, sin = cos_sin[:, None].split(pairs, -1)
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rotated_without_a_slot(op: Op, backend: str, args: dict[str, Any], *heads: str) -> None:
    """Asserts that `op`, given no slot, rotates the arguments `heads` and writes nothing else."""
    args = args | dict(slot_mapping=torch.full_like(args["slot_mapping"], -1))
    got = contract.copy(args)
    op.backends[backend].run(**got)
    for name in op.mutates:
        if name not in heads:
            assert torch.equal(got[name], args[name]), name
    for name in heads:
        x = args[name].view(len(args[name]), -1, args[name].shape[-1])
        expected = rotated(x, args["cos_sin_cache"][args["positions"]]).view_as(args[name])
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-5)


def same_bits(op: Op, fused: dict[str, Any], separate: dict[str, Any]) -> None:
    """Asserts that what `op` writes is the same in both."""
    for name in op.mutates:
        assert contract.same_bits(fused[name], separate[name]), name
