"""All-reduces by MSCCL++, where its Python package is installed and a server is asked to use it (`--enable-mscclpp`):
its own kernels for messages of 512 bytes to 8 MiB, torch.distributed for all else.

What is called is what the package publishes: CommGroup over a group of gloo's, RawGpuBuffer for scratch memory,
AlgorithmCollectionBuilder.build_default_algorithms, and Algorithm.execute in place on the current stream.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import dlpack

from wave64.distributed.groups import WORLD, Group, said, serve_by

SIZES = (4, 8, 16, 32, 64)  # of a group
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_BYTES, MAX_BYTES, ALIGN = 1 << 9, 8 << 20, 16
SCRATCH_BYTES = 128 << 20
#: The default algorithms that need neither multicast nor memory allocated in a special way, the one for small messages
#: first; each has a range of sizes of its own.
ALGORITHMS = ("default_allreduce_packet", "default_allreduce_rsag_zero_copy")


class Communicator:
    """All-reduces of one group. package: `mscclpp`; process_group: gloo's, of the same ranks."""

    def __init__(self, package: Any, process_group: Any) -> None:
        self._package = package
        self._dtype_of = importlib.import_module(f"{package.__name__}.utils").torch_dtype_to_mscclpp_dtype
        self._group = package.CommGroup(torch_group=process_group)
        scratch = package.RawGpuBuffer(SCRATCH_BYTES).to_dlpack(data_type=str(torch.float16))
        self._scratch = dlpack.from_dlpack(scratch)
        found = package.AlgorithmCollectionBuilder().build_default_algorithms(
            scratch_buffer=self._scratch.data_ptr(), scratch_buffer_size=self._scratch.nbytes,
            rank=self._group.my_rank)  # fmt: skip
        named = {each.name: each for each in found if each.collective == "allreduce"}
        self._algorithms = [named[name] for name in ALGORITHMS if name in named]
        if not self._algorithms:
            raise RuntimeError(f"expected one of {', '.join(ALGORITHMS)} among its algorithms, got {', '.join(named)}")

    def all_reduce(self, x: Tensor) -> bool:
        """Sum x over the ranks, in place, on the current stream; whether that was done: all ranks come to the same."""
        size = x.nbytes
        if not MIN_BYTES <= size <= MAX_BYTES or size % ALIGN or x.dtype not in DTYPES or not x.is_contiguous():
            return False
        fit = (each for each in self._algorithms if each.message_size_range[0] <= size <= each.message_size_range[1])
        algorithm = next(fit, None)
        if algorithm is None:
            return False
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        status = algorithm.execute(
            comm=self._group.communicator, input_buffer=x.data_ptr(), output_buffer=x.data_ptr(), input_size=size,
            output_size=size, dtype=self._dtype_of(x.dtype), op=self._package.ReduceOp.SUM, stream=stream)  # fmt: skip
        if int(status):
            raise RuntimeError(f"MSCCL++: all_reduce of {size} bytes by {algorithm.name}: status {int(status)}")
        return True


def connect(group: Group) -> str | None:
    """Let MSCCL++ sum what the ranks of a group have, as far as it can. Every rank of the world calls it. Returns None,
    or why it cannot, the same on all."""
    why = _refused(group)
    if why is None:  # before ranks wait for each other
        why = _first(said(None if find_spec("mscclpp") else "the package mscclpp is missing", group.name))
    if why is None:
        why = _first(said(_make(group), group.name))
        if why is not None:
            serve_by(group.name, None)
    return why


def _first(reasons: list[str | None]) -> str | None:
    return next((f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why), None)


def _refused(group: Group) -> str | None:
    if group.name != WORLD:
        return "groups of data-parallel attention are torch.distributed's"
    if group.size not in SIZES:
        return f"expected {', '.join(map(str, SIZES))} ranks, got {group.size}"
    return None


def _make(group: Group) -> str | None:
    process_group = dist.new_group(backend="gloo")
    try:
        serve_by(group.name, Communicator(importlib.import_module("mscclpp"), process_group))
    except (AttributeError, ImportError, RuntimeError, TypeError) as error:
        return f"the package mscclpp is another than this is written for: {type(error).__name__}: {error}"
    return None
