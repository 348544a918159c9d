"""A rank of an engine: what every one has, rank 0 and the others; and what it sets up in its process.

What is asked for is looked at here: the model's configuration, device, dtypes, threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import wave64
from wave64 import OPS, NotSupported, backends, quant
from wave64.arch import EMULATED
from wave64.backends import peers
from wave64.distributed import Store
from wave64.serve.args import SERVED_BY, ArgsError, ServerArgs, flag_of
from wave64.serve.engine.graphs import batch_sizes
from wave64.serve.engine.memory import host_pages, pool_pages
from wave64.serve.engine.ranks import join, ranks_of, served, smallest
from wave64.serve.engine.runner import Runner
from wave64.serve.engine.team import RankLost
from wave64.serve.messages import BadRequest, SamplingParams, check_params
from wave64.serve.model.checkpoint import WeightsError
from wave64.serve.model.config import DTYPES, ConfigError, ModelConfig
from wave64.serve.model.load import Progress, load_model, refuse_unless_split
from wave64.serve.model.parallel import ONE
from wave64.serve.model.schemes import ONLINE
from wave64.serve.model_path import resolve_model_path

if TYPE_CHECKING:
    from wave64.backends.prebuilt import Reader

log = logging.getLogger("wave64")

SIOCGIFADDR = 0x8915  # ioctl: the address of a network interface
PROMPT_TOKENS = 512  # of a step that is captured: many more take longer than their launches
ONE_THREAD_BYTES = 32 << 20  # a smaller model is done before a second thread has woken, or waits for it on a busy CPU
SAID_IN_WORDS = (ArgsError, ConfigError, WeightsError, RankLost, NotSupported, peers.WaitTimeout,
                 peers.CallsDiffer)  # worded for the operator
PREFILL_CHUNK = {"cpu": 256, "cuda": 8192}
DTYPE_ALIASES = {"half": "float16", "float": "float32"}


class Rank:
    """What every rank of an engine has: a device, its part of the model, a KV pool, and the runner around them.

    Raises as Engine does.
    """

    def __init__(self, args: ServerArgs, rank: int = 0, local_rank: int = 0, store: Store | None = None,
                 say: Callable[[str, str], None] = lambda doing, device: None,
                 progress: Progress | None = None) -> None:  # fmt: skip
        """local_rank: the number of its device on this host. store: where the ranks meet. say: gets what comes next,
        and the device. progress: as for load_model."""
        folder = resolve_model_path(args.model_path, args.revision)
        self.device = _device(args.device, args.base_gpu_id + local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # streams, graphs and launches are the current device's
        say("joining the other ranks", str(self.device))
        ranks = ONE if store is None else join(args, rank, store, self.device)
        self.backends = served(wave64.report(self.device.type), ranks)
        if rank == 0:
            log.info("what serves each operator:\n%s", wave64.table(self.backends))
        self.config = config_of(folder, args)
        refuse_without_kernels(self.config, self.device.type)
        self.dtype = self.config.dtype if args.dtype == "auto" else DTYPES[DTYPE_ALIASES.get(args.dtype, args.dtype)]
        say("loading weights", str(self.device))
        model = load_model(self.config, folder, self.dtype, self.device, args.load_format, ranks, progress)
        say("allocating the KV pool", str(self.device))
        kv_dtype = kv_dtype_of(args.kv_cache_dtype, self.dtype, self.device, has_kv_scales(self.config))
        self.num_pages = smallest(pool_pages(args, self.config, kv_dtype, self.device, ranks), ranks, self.device)
        self.host_pages = host_pages(args, self.config, self.num_pages, kv_dtype, ranks)
        self.max_running = min(-(-args.max_running_requests // args.groups), self.num_pages)
        emulated = wave64.platform.emulated() is not None
        self.is_gpu = self.device.type == "cuda" or emulated
        capture = self.is_gpu and not args.disable_cuda_graph
        # What gloo exchanges is no launch that a graph of emulated devices could hold.
        capture = capture and not (emulated and any(group.size > 1 and peers.reason(group.name)
                                                    for group in (ranks.world, ranks.attention, ranks.data)))
        self.runner = Runner(model, self.config, kv_dtype, self.device, self.num_pages, args.page_size,
                             self.max_running, capture, ranks=ranks, graph_sizes=graph_sizes(args, self.max_running),
                             prompt_tokens=prompt_tokens(args, emulated), host_pages=self.host_pages,
                             one_by_one=args.enable_deterministic_inference)  # fmt: skip


def prefill_budget(args: ServerArgs, context_length: int, is_gpu: bool) -> int:
    """Prompt tokens of a step at most."""
    is_fast = is_gpu and not args.enable_deterministic_inference
    chunk = args.chunked_prefill_size or PREFILL_CHUNK["cuda" if is_fast else "cpu"]
    if chunk == -1:
        return max(context_length, args.max_prefill_tokens)
    return min(chunk, args.max_prefill_tokens)


def prompt_tokens(args: ServerArgs, emulated: bool) -> int:
    """Of a step that is captured, at most."""
    if args.piecewise_cuda_graph_max_tokens is None:
        return 0 if emulated else PROMPT_TOKENS
    return args.piecewise_cuda_graph_max_tokens


def graph_sizes(args: ServerArgs, max_running: int) -> Sequence[int]:
    """The batch sizes that flags ask to capture; none: the ladder's."""
    if args.enable_deterministic_inference:
        return (1,)
    if not args.cuda_graph_bs and args.cuda_graph_max_bs is not None:
        return batch_sizes(min(max_running, args.cuda_graph_max_bs))
    return args.cuda_graph_bs


def config_of(folder: Path, args: ServerArgs) -> ModelConfig:
    """The model's configuration, with the context length that was asked for."""
    config = ModelConfig.from_folder(folder, args.ignore_config_key)
    if config.passed_by:
        log.info("%s: not known and passed by: %s", folder / "config.json", ", ".join(config.passed_by))
    if args.ignore_config_key:
        log.info("ignored, as --ignore-config-key says: %s", ", ".join(args.ignore_config_key))
    config = _quantized(config, folder, args.quantization)
    defaults: dict[str, Any] = config.sampling_defaults
    try:
        check_params(SamplingParams(**defaults))
    except BadRequest as error:
        raise ConfigError(f"{folder / 'generation_config.json'}: {error}") from None
    if args.context_length is None:
        return config
    if args.context_length > config.context_length:
        raise ArgsError(
            f"--context-length: expected at most {config.context_length}, the model's own, got {args.context_length}"
        )
    return replace(config, context_length=args.context_length)


def _quantized(config: ModelConfig, folder: Path, method: str | None) -> ModelConfig:
    """With schemes for quantizing plain weights while they are loaded, if `method` asks for that."""
    own = "fp8" if config.quantization else config.schemes.method if config.schemes else None
    if method in (None, own):
        return config
    if own is not None:
        raise ArgsError(f"--quantization: expected {own}, as {folder / 'config.json'} has it, or no such flag, got "
                        f"{method}")
    if method != "fp8":
        raise ArgsError(f"--quantization: expected fp8, which quantizes the plain weights of {folder}, got {method}")
    if config.mla is not None:
        raise ArgsError(f"--quantization: {config.architecture} is not quantized while it is loaded; expected a "
                        "checkpoint in FP8 blocks and no such flag, got fp8")
    return replace(config, schemes=ONLINE)


def _device(name: str, number: int = 0) -> torch.device:
    """Where tensors lie. An emulated device's lie on the CPU, inside `wave64.emulate`."""
    emulated = wave64.platform.emulated()
    if emulated is not None and name not in ("auto", emulated.arch.name):
        raise ArgsError(f"--device: expected {emulated.arch.name}, inside wave64.emulate, got {name}")
    if emulated is None and name in EMULATED:
        raise ArgsError(f"--device: expected wave64.emulate({name!r}) around the engine, got {name} without")
    if emulated is not None:
        return torch.device("cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgsError("--device: cuda was asked for, and torch sees no GPU; use cpu, or see python -m wave64")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= (count := torch.cuda.device_count()):
        raise ArgsError(f"--tp-size: one GPU per rank is needed, and torch sees {count} on this host: no GPU {number}")
    return torch.device("cuda", number)


def has_kv_scales(config: ModelConfig) -> bool:
    stored = config.quantization or config.schemes
    return bool(stored and stored.kv_scales)


def kv_dtype_of(name: str, model_dtype: torch.dtype, device: torch.device, scaled: bool = False) -> torch.dtype:
    """What keys, values and latents are kept in; scaled: the checkpoint has scales of them. A CPU keeps OCP's FP8."""
    arch = wave64.platform.arch() if device.type == "cuda" or wave64.platform.emulated() else None
    has_fp8 = arch is None or arch.fp8 is not None
    if name == "bf16" and model_dtype != torch.bfloat16:
        raise ArgsError(f"--kv-cache-dtype: expected auto or fp8_e4m3, or --dtype bfloat16, got bf16 for a model in "
                        f"{str(model_dtype).removeprefix('torch.')}")
    if name == "bf16" or name == "auto" and not (scaled and has_fp8):
        return model_dtype
    if arch and not has_fp8:
        raise ArgsError(f"--kv-cache-dtype: {arch.name} has no FP8, got {name}; use auto")
    return quant.fp8_dtype()


def refuse(args: ServerArgs) -> Path:
    """Raises what Engine would raise later, where ranks are more than devices, lack kernels or cannot split the model;
    returns the model's folder."""
    folder = resolve_model_path(args.model_path, args.revision)
    device = _device(args.device, args.base_gpu_id + args.tp_size // args.nnodes - 1)
    config = config_of(folder, args)
    if config.moe is None and args.ep_size != 1 and args.groups == 1:
        raise ArgsError(f"--ep-size: expected 1, for a model without experts, got {args.ep_size}")
    refuse_without_kernels(config, device.type)
    refuse_unless_split(config, ranks_of(args, 0))
    return folder


def refuse_without_kernels(config: ModelConfig, device_type: str) -> None:
    """Raises ArgsError where a GPU, or an emulated one, would compute experts by the operator's reference, which waits
    for the device: no graph can be captured of it."""
    emulated = wave64.platform.emulated()
    if config.moe is None or device_type == "cpu" and emulated is None:
        return
    if why := backends.reason(OPS["fused_moe"], "triton", device_type):
        hint = "pip install triton" if emulated else "install the Triton that belongs to this torch (docs/install.md)"
        raise ArgsError(f"--device: {emulated.arch.name if emulated else device_type} computes the experts of this "
                        f"model by Triton's kernels, and {why}; {hint}")


def use_interface(address: str) -> None:
    """Let gloo use the network interface that has this address: the host's own name may not resolve, or not to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24]
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@contextlib.contextmanager
def surroundings(args: ServerArgs, is_first: bool = True) -> Iterator[Reader | None]:
    """What a rank has to run within: an emulated device, where one is asked for, the backends that flags name, and
    Triton's kernels that were compiled ahead, whose reader is given where Triton is used. is_first: of the ranks, whose
    log says so. Raises NotSupported where backends cannot serve, and ArgsError for kernels that there are not."""
    with contextlib.ExitStack() as stack:
        if args.device in EMULATED:
            stack.enter_context(wave64.emulate(args.device))
        stack.enter_context(named_backends(args))
        yield _prebuilt_kernels(args, is_first, stack)


def _prebuilt_kernels(args: ServerArgs, is_first: bool, stack: contextlib.ExitStack) -> Reader | None:
    arch = None if args.device == "cpu" else wave64.platform.arch()
    if arch is None or backends.interpreted() or importlib.util.find_spec("triton") is None:
        return None
    from wave64.backends import prebuilt  # which imports Triton

    try:
        return stack.enter_context(prebuilt.reading(args.prebuilt_kernels, arch.name, is_first))
    except prebuilt.PrebuiltError as error:
        raise ArgsError(f"--prebuilt-kernels: {error}") from None


def named_backends(args: ServerArgs) -> contextlib.AbstractContextManager[None]:
    """Inside, of the operators of a flag that names a backend those that it has a kernel of are served by it. Raises
    NotSupported where it can serve none of them."""
    device = "cpu" if args.device == "cpu" else wave64.platform.device_type()
    chosen = {}
    for name, operators in SERVED_BY.items():
        if (backend := getattr(args, name)) == "auto":
            continue
        why = {op: backends.reason(OPS[op], backend, device) for op in operators}
        if all(why.values()):
            raise NotSupported(f"{flag_of(name)}: {backend} cannot serve {operators[0]}: {why[operators[0]]}")
        chosen |= {op: backend for op, reason in why.items() if reason is None}
    return wave64.use(**chosen) if chosen else contextlib.nullcontext()


def set_threads(args: ServerArgs) -> Callable[[int], None]:
    """Divide the CPUs among the ranks of this host; what is returned is to be called with the bytes of the weights, and
    leaves a small model one thread."""
    if "OMP_NUM_THREADS" in os.environ:
        return lambda weight_bytes: None
    torch.set_num_threads(max(1, _usable_cpus() // (args.replicas * args.tp_size // args.nnodes)))
    return lambda weight_bytes: torch.set_num_threads(1) if weight_bytes < ONE_THREAD_BYTES else None


def _usable_cpus() -> int:
    """CPUs this process may use: its affinity, and its container's quota, which torch does not look at."""
    cpus = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (limit := quota.read_text().split())[0] != "max":
        cpus = min(cpus, max(1, int(limit[0]) // int(limit[1])))
    return min(cpus, torch.get_num_threads())  # torch counts cores, not the two threads of each


def one_line(error: Exception) -> str:
    """The error for the operator: as it is where it was worded for one, else with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SAID_IN_WORDS) else f"{type(error).__name__}: {text}"
