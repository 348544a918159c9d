"""How large the KV pool may be, from the flags and from the memory that is free once the weights are loaded."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from wave64.serve.args import ServerArgs
from wave64.serve.model import FAMILIES
from wave64.serve.model.config import ConfigError, ModelConfig
from wave64.serve.model.layers import KVCache
from wave64.serve.model.parallel import ONE, Ranks

log = logging.getLogger("wave64")

GPU_FRACTION = 0.85  # of device memory for weights and pool; the rest is for activations and graphs
CPU_CONTEXTS = 4  # without a flag, a pool in main memory holds this many whole contexts,
CPU_POOL_BYTES = 1 << 30  # or this much, whichever is less


def kv_cache(config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device,
             ranks: Ranks = ONE, pinned: bool = False) -> list[KVCache]:
    """The pool of one of the ranks, layer by layer: zeros, since AITER's attention multiplies by 0 what lies behind a
    sequence's last token; uninitialized on a host, where pages are only kept."""
    shapes = FAMILIES[config.architecture].kv_shapes(config, ranks, num_pages, page_size)
    make = torch.empty if pinned else torch.zeros
    return [tuple(make(shape, dtype=dtype, device=device, pin_memory=pinned) for shape in shapes)
            for _ in range(config.num_layers)]


def host_pages(args: ServerArgs, config: ModelConfig, num_pages: int, dtype: torch.dtype, ranks: Ranks = ONE) -> int:
    """The pages of the prefix cache's host tier, next to a pool of so many; 0 without one.

    Raises ConfigError where this host has no memory for those of all of its ranks.
    """
    if not args.enable_hierarchical_cache:
        return 0
    pages = max(1, int(num_pages * args.hicache_ratio))
    size = pages * args.page_size * _token_bytes(config, dtype, ranks)
    free = _available_ram() // (args.replicas * ranks.world.size // args.nnodes)
    if size > free:
        raise ConfigError(f"--hicache-ratio: {args.hicache_ratio:g} times the KV pool is {size / 2**30:.1f} GiB of "
                          f"host memory for each rank, and {free / 2**30:.1f} GiB are available; give a smaller one, "
                          "or --max-total-tokens")  # fmt: skip
    log.info("host tier of the prefix cache: %d pages, %.1f MiB (--hicache-ratio)", pages, size / 2**20)
    return pages


def _token_bytes(config: ModelConfig, dtype: torch.dtype, ranks: Ranks) -> int:
    """What a token takes in a rank's pool."""
    shapes = FAMILIES[config.architecture].kv_shapes(config, ranks, 1, 1)
    return config.num_layers * sum(map(math.prod, shapes)) * dtype.itemsize


def pool_pages(args: ServerArgs, config: ModelConfig, dtype: torch.dtype, device: torch.device,
               ranks: Ranks = ONE) -> int:
    """The number of KV pages that this rank has memory for, at least 1; says in the log how it was chosen. dtype: of
    what they hold.

    Raises ConfigError when not even one page fits.
    """
    per_token = _token_bytes(config, dtype, ranks)
    if args.max_total_tokens is not None:
        tokens, why = args.max_total_tokens, "--max-total-tokens"
        pages = -(-tokens // args.page_size)
    else:
        free, why = _free_bytes(args.mem_fraction_static, device)
        if device.type == "cpu":  # all ranks of this host share the memory
            free //= args.replicas * ranks.world.size // args.nnodes
        tokens = free // per_token
        if device.type == "cpu" and args.mem_fraction_static is None:
            tokens = min(tokens, CPU_CONTEXTS * config.context_length, CPU_POOL_BYTES // per_token)
            why = f"at most {CPU_CONTEXTS} contexts and 1 GiB on a CPU; --max-total-tokens sets another size"
        pages = tokens // args.page_size
    if pages < 1:
        raise ConfigError(
            f"KV pool: one page of {args.page_size} tokens takes {args.page_size * per_token} bytes, more than is left "
            f"({why}); use a smaller model, a larger --mem-fraction-static, or give --max-total-tokens"
        )
    size = pages * args.page_size
    log.info("KV pool: %d tokens in %d pages, %.1f MiB (%s)", size, pages, size * per_token / 2**20, why)
    return pages


def _free_bytes(fraction: float | None, device: torch.device) -> tuple[int, str]:
    """Bytes that the pool may take, and why."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = fraction or GPU_FRACTION
        return int(free - total * (1 - used)), f"{used:.3g} of {total / 2**30:.0f} GiB less what is in use"
    free = _available_ram()
    used = fraction or 0.5
    return int(free * used), f"{used:.3g} of {free / 2**30:.1f} GiB of available memory"


def _available_ram() -> int:
    """Bytes that this process may still take: what the system has, or what its container allows."""
    meminfo = Path("/proc/meminfo").read_text()
    free = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
