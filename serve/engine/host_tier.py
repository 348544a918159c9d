"""The host tier of the prefix cache, as a rank has it: a second pool in pinned host memory, and copies between the two.

On a GPU a step's copies run on a stream of their own while the device computes the step. They begin when all that was
launched before has ended, since that may still read or write the pages that are loaded, and the next step begins when
they have ended. So what the scheduler promises (prefix_cache.py) is all that makes a page safe to be read or reused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wave64 import ops
from wave64.serve.engine.schedule import Schedule
from wave64.serve.model.layers import KVCache


class HostTier:
    """copy() what a step stores and loads, before the step is launched."""

    def __init__(self, kv_cache: list[KVCache], host_cache: list[KVCache], device: torch.device) -> None:
        self._pairs = [pair for pools in zip(kv_cache, host_cache, strict=True) for pair in zip(*pools, strict=True)]
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ended: torch.Event | None = None  # the copies of the step before

    def copy(self, step: Schedule) -> None:
        """Launch the copies of a step; what is launched afterwards follows those of the step before, and these, too, if
        the step reads what it loads."""
        computing = None
        if self._side is not None:
            computing = torch.cuda.current_stream(self._device)
            if self._ended is not None:
                computing.wait_event(self._ended)
                self._ended = None
        if not step.stores and not step.loads:
            return
        if self._side is None or computing is None:
            self._launch(step)
            return
        self._side.wait_stream(computing)
        with torch.cuda.stream(self._side):
            self._launch(step)
            ended = self._ended = self._side.record_event()
        if step.reads_loads:
            computing.wait_event(ended)

    def _launch(self, step: Schedule) -> None:
        if step.stores:
            pages, hosts = self._slots(step.stores)
            for pool, host in self._pairs:
                ops.transfer_kv(pool, host, pages, hosts)
        if step.loads:
            hosts, pages = self._slots(step.loads)
            for pool, host in self._pairs:
                ops.transfer_kv(host, pool, hosts, pages)

    def _slots(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Sources and targets, on the device."""
        both = torch.tensor(pairs, dtype=torch.int64).T.contiguous()
        if self._side is not None:
            both = both.pin_memory().to(self._device, non_blocking=True)
        return both[0], both[1]
