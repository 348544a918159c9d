"""The engine: a model, its runner and a scheduler behind add(), abort() and step(); and the process around them.

A step is three verbs: schedule, run, commit. `Engine` is whole in one process, for tests and offline use;
`run_engine` is what the api process starts, with `messages` going in and out over ZeroMQ.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

import wave64
from wave64 import quant
from wave64.arch import EMULATED
from wave64.backends import peers
from wave64.distributed import Store
from wave64.serve.args import ArgsError, ServerArgs
from wave64.serve.engine.grammar import Grammars
from wave64.serve.engine.memory import pool_pages
from wave64.serve.engine.pages import PagePool
from wave64.serve.engine.ranks import join, ranks_of, smallest
from wave64.serve.engine.runner import Runner
from wave64.serve.engine.scheduler import Scheduler, Sequence
from wave64.serve.engine.team import RankLost, Team
from wave64.serve.engine.watchdog import CHECK_S, Watchdog
from wave64.serve.messages import (
    Abort,
    Alive,
    BadRequest,
    Failed,
    FlushCache,
    Flushed,
    Limits,
    Output,
    Outputs,
    Ready,
    Request,
    SamplingParams,
    Statistics,
    Vocabulary,
    check_params,
    check_request,
    decode_to_engine,
    encode,
)
from wave64.serve.model.checkpoint import WeightsError
from wave64.serve.model.config import DTYPES, ConfigError, ModelConfig
from wave64.serve.model.load import Progress, load_model, refuse_unless_split
from wave64.serve.model.parallel import ONE
from wave64.serve.model_path import resolve_model_path

log = logging.getLogger("wave64")

SIOCGIFADDR = 0x8915  # ioctl: the address of a network interface
IDLE_POLL_MS = 1000  # how often an idle engine looks whether its parent is still there
ONE_THREAD_BYTES = 32 << 20  # a smaller model is done before a second thread has woken, or waits for it on a busy CPU
STEP_S = 300.0  # how long a step may take, besides compiling
REPORT_S = 5.0  # a busy engine says how fast it is this often, at most
PREFILL_CHUNK = {"cpu": 256, "cuda": 8192}
SAID_IN_WORDS = (ArgsError, ConfigError, WeightsError, RankLost, wave64.NotSupported)  # worded for the operator
DTYPE_ALIASES = {"half": "float16", "float": "float32"}


class Throughput:
    """What a busy engine says of itself every few seconds; rates are of the time that steps took."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reported = clock()
        self._began = self._busy = 0.0
        self._prompt = self._generated = 0

    def begin(self) -> None:
        """A step begins."""
        self._began = self._clock()

    def end(self, prompt: int, generated: int) -> str | None:
        """A step ends that computed so many prompt tokens and generated so many; a line, if it is time for one."""
        now = self._clock()
        self._busy += now - self._began
        self._prompt += prompt
        self._generated += generated
        if now - self._reported < REPORT_S or not self._busy:
            return None
        rates = (self._prompt / self._busy, self._generated / self._busy)
        self._reported, self._busy, self._prompt, self._generated = now, 0.0, 0, 0
        return "throughput: {:.1f} prompt and {:.1f} generated tokens/s".format(*rates)


class Rank:
    """What every rank of an engine has: a device, its part of the model, a KV pool, and the runner around them.

    Raises as Engine does.
    """

    def __init__(self, args: ServerArgs, rank: int = 0, local_rank: int = 0, store: Store | None = None,
                 say: Callable[[str, str], None] = lambda doing, device: None,
                 progress: Progress | None = None) -> None:  # fmt: skip
        """local_rank: the number of its device on this host. store: where the ranks meet. say: is told what comes next,
        and the device. progress: as for load_model."""
        folder = resolve_model_path(args.model_path, args.revision)
        self.device = _device(args.device, args.base_gpu_id + local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # streams, graphs and launches are the current device's
        self.backends = wave64.report(self.device.type)
        if rank == 0:
            log.info("what serves each operator:\n%s", wave64.table(self.backends))
        self.config = _config(folder, args)
        self.dtype = self.config.dtype if args.dtype == "auto" else DTYPES[DTYPE_ALIASES.get(args.dtype, args.dtype)]
        say("joining the other ranks", str(self.device))
        ranks = ONE if store is None else join(args, rank, store, self.device)
        say("loading weights", str(self.device))
        model = load_model(self.config, folder, self.dtype, self.device, args.load_format, ranks, progress)
        say("allocating the KV pool", str(self.device))
        kv_dtype = _kv_dtype(args.kv_cache_dtype, self.dtype, self.device)
        self.num_pages = smallest(pool_pages(args, self.config, kv_dtype, self.device, ranks), ranks, self.device)
        self.max_running = min(-(-args.max_running_requests // args.groups), self.num_pages)
        emulated = wave64.platform.emulated() is not None
        self.is_gpu = self.device.type == "cuda" or emulated
        # What ranks exchange over gloo, as emulated ones do, is no launch that a graph could hold.
        capture = self.is_gpu and not args.disable_cuda_graph and not (emulated and args.tp_size > 1)
        capture = capture and args.groups == 1  # groups would have to replay the same graph
        self.runner = Runner(model, self.config, kv_dtype, self.device, self.num_pages, args.page_size,
                             self.max_running, capture, ranks=ranks)  # fmt: skip


class Engine:
    """Continues token sequences. Not thread-safe; nothing runs between calls of step().

    team: the other ranks, where this is rank 0 of several.

    Raises ArgsError, ConfigError, WeightsError or NotSupported, each in one line for the operator, when it cannot be
    built.
    """

    def __init__(self, args: ServerArgs, team: Team | None = None) -> None:
        rank = Rank(args) if team is None else Rank(args, store=team.store, say=team.say, progress=team.progress)
        self.team, self._steps = team, 0
        self.device, self.config, self.dtype, self.runner = rank.device, rank.config, rank.dtype, rank.runner
        self._backends, self.is_gpu = rank.backends, rank.is_gpu
        pools = [PagePool(rank.num_pages, args.page_size) for _ in range(args.groups)]
        self.limits = Limits(self.config.context_length, pools[0].num_tokens, self.config.vocab_size)
        self.schedulers = [Scheduler(pool, rank.max_running, self._prefill_budget(args), policy=args.schedule_policy,
                                     reuse_prefixes=not args.disable_radix_cache) for pool in pools]  # fmt: skip
        self.scheduler, self.pool = self.schedulers[0], pools[0]  # all there is, but with data-parallel attention
        self._eos = frozenset(i for i in self.config.eos_token_ids if i < self.config.vocab_size)
        self.grammars = Grammars(self.config.vocab_size, self._eos)
        self._seeds = random.Random(args.random_seed)
        self._refused: list[Output] = []
        self._throughput = Throughput()
        self._totals = (0, 0)  # prompt tokens computed, tokens generated
        if team is not None:
            team.say("waiting for requests")

    def _prefill_budget(self, args: ServerArgs) -> int:
        chunk = args.chunked_prefill_size or PREFILL_CHUNK["cuda" if self.is_gpu else "cpu"]
        if chunk == -1:
            return max(self.config.context_length, args.max_prefill_tokens)
        return min(chunk, args.max_prefill_tokens)

    def ready(self) -> Ready:
        """What a client may ask of this engine, what the model recommends, and which backends serve it."""
        return Ready(
            **msgspec.structs.asdict(self.limits),
            device=wave64.platform.device_name() if self.is_gpu else "cpu",
            dtype=str(self.dtype).removeprefix("torch."),
            backends=self._backends,
            sampling_defaults=self.config.sampling_defaults,
        )

    @property
    def has_work(self) -> bool:
        """Whether step() has something to run or to say."""
        return bool(any(map(len, self.schedulers)) or self._refused or self.grammars)

    def add(self, request: Request) -> None:
        """Queue a request. One that cannot be served is answered by the next step(), with finish_reason "error".

        Raises ValueError if a live request has the same rid: its answers could not be told apart.
        """
        if any(request.rid in live for live in (*self.schedulers, self.grammars)):
            raise ValueError(f"request {request.rid!r} is already there; every live request needs its own rid")
        params = request.params
        try:
            check_request(request.input_ids, params, self.limits)
        except BadRequest as error:
            self._refused.append(Output(request.rid, [], "error", error=str(error)))
            return
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        seq = Sequence(request, stops, random.Random(seed))
        if request.grammar is None:
            min(self.schedulers, key=len).add(seq)
        else:
            self.grammars.attach(request.rid, seq, request.grammar)

    def abort(self, rid: str) -> None:
        """Forget a request and free its pages at once; no Output follows. An unknown rid is ignored."""
        self.grammars.forget(rid)
        for scheduler in self.schedulers:
            scheduler.abort(rid)

    def flush(self) -> bool:
        """Empty the prefix cache, if no request is there; whether it was done."""
        return not self.has_work and all([scheduler.flush() for scheduler in self.schedulers])

    def step(self) -> list[Output]:
        """Run one step, if there is work. What fails in it fails the requests that took part, and no others; among
        several ranks, whose states would differ from there on, it is raised."""
        outputs, self._refused = self._refused, []
        for rid, seq, wrong in self.grammars.ready(is_idle=not any(map(len, self.schedulers))):
            if wrong is None:
                min(self.schedulers, key=len).add(seq)
            else:
                outputs.append(Output(rid, [], "error", error=wrong))
        steps = [scheduler.schedule() for scheduler in self.schedulers]
        if not any(step.rows for step in steps):
            for scheduler in self.schedulers:
                scheduler.drop()
            return outputs
        self._throughput.begin()
        self._steps += 1
        try:
            if self.team is not None:
                self.team.begin(self._steps, steps)
            sampled = self.runner.run_groups(steps, [scheduler.sampling() for scheduler in self.schedulers])
            peers.check()
        except Exception as error:
            if self.team is not None:
                raise
            log.exception("a step of %d requests failed", len(steps[0].rows))
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the device itself is lost: then there is no going on
            why = f"the engine failed while computing this request: {type(error).__name__}: {error}"
            return outputs + [Output(seq.request.rid, [], "error", error=why) for seq in self.scheduler.drop()]
        prompt = sum(sum(step.counts[step.num_decodes :]) for step in steps)
        generated = sum(len(each.ids) for each in sampled)
        self._totals = (self._totals[0] + prompt, self._totals[1] + generated)
        if line := self._throughput.end(prompt, generated):
            now = self.statistics()
            log.info("%s; %d running, %d waiting, %d of %d KV pages in use", line, now.running, now.waiting,
                     now.pages_used, now.pages_total)
        for scheduler, each in zip(self.schedulers, sampled, strict=True):
            outputs += scheduler.commit(each)
        if self.team is not None and not self.has_work:
            self.team.say("waiting for requests")
        return outputs

    def statistics(self) -> Statistics:
        """The state of the engine between two steps."""
        each = [(len(s.running), len(s.waiting), s.pool.num_pages - s.cache.num_available, s.pool.num_pages,
                 s.preemptions, s.cached_tokens, s.cache.num_pages) for s in self.schedulers]  # fmt: skip
        running, waiting, used, pages, *totals = map(sum, zip(*each, strict=True))
        return Statistics(running, waiting, used, pages, *self._totals, *totals)


def _config(folder: Path, args: ServerArgs) -> ModelConfig:
    """The model's configuration, with the context length that was asked for."""
    config = ModelConfig.from_folder(folder, args.ignore_config_key)
    if config.passed_by:
        log.info("%s: not known and passed by: %s", folder / "config.json", ", ".join(config.passed_by))
    if args.ignore_config_key:
        log.info("ignored, as --ignore-config-key says: %s", ", ".join(args.ignore_config_key))
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


def _kv_dtype(name: str, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys, values and latents are kept in. A CPU keeps OCP's FP8."""
    if name == "auto":
        return model_dtype
    arch = wave64.platform.arch() if device.type == "cuda" or wave64.platform.emulated() else None
    if arch and arch.fp8 is None:
        raise ArgsError(f"--kv-cache-dtype: {arch.name} has no FP8, got {name}; use auto")
    return quant.fp8_dtype()


def run_engine(args: ServerArgs, requests: str, outputs: str, torchrun: str | None = None) -> None:
    """Be the engine process: bind the ZeroMQ endpoint `requests`, connect to `outputs`, serve until ended. torchrun:
    names its run, where it has started the other ranks.

    Ends when its parent does, at SIGTERM, or, with status 1 and after a Failed message, when it cannot start or when
    the device is lost. Ctrl-C in a terminal reaches the api process too, which then sends SIGTERM.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threads = set_threads(args)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for pipe in (inbox, outbox):
        pipe.setsockopt(zmq.SNDHWM, 0)
        pipe.setsockopt(zmq.RCVHWM, 0)
    stack = contextlib.ExitStack()
    try:
        inbox.bind(requests)
        outbox.connect(outputs)
        team = None
        try:
            stack.enter_context(emulation(args))
            team = _team(args, outputs, torchrun) if args.tp_size > 1 else None
            engine = Engine(args, team)
            threads(engine.runner.weight_bytes)
            outbox.send(encode(engine.ready()))
            _serve(engine, inbox, outbox, parent, _watchdog(args, team, _telling(outputs)))
        except Exception as error:
            log.debug("the engine ends", exc_info=True)
            outbox.send(encode(Failed(one_line(error) if team is None else team.blame(one_line(error)))))
            sys.exit(1)
        finally:
            if team is not None:
                team.close()
    finally:
        stack.close()
        context.destroy(linger=1000)


def refuse(args: ServerArgs) -> Path:
    """Raises what Engine would raise later, where ranks are more than devices or cannot split the model; returns the
    model's folder."""
    folder = resolve_model_path(args.model_path, args.revision)
    _device(args.device, args.base_gpu_id + args.tp_size // args.nnodes - 1)
    config = _config(folder, args)
    if config.moe is None and args.ep_size != 1 and args.groups == 1:
        raise ArgsError(f"--ep-size: expected 1, for a model without experts, got {args.ep_size}")
    refuse_unless_split(config, ranks_of(args, 0))
    return folder


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


def _team(args: ServerArgs, outputs: str, torchrun: str | None) -> Team:
    """The other ranks, once it is known that the model can be split over them. Their thread has a pipe of its own."""
    folder = refuse(args)
    team = Team(args, folder, _telling(outputs), torchrun)
    use_interface(team.address)
    return team


def _telling(outputs: str) -> Callable[[Alive | Failed], None]:
    """Says something to the api process from a thread that is not the main one: over a pipe of its own."""
    pipe: list[zmq.Socket] = []

    def tell(message: Alive | Failed) -> None:
        if not pipe:
            pipe.append(zmq.Context.instance().socket(zmq.PUSH))
            pipe[0].connect(outputs)
        pipe[0].send(encode(message))

    return tell


def _watchdog(args: ServerArgs, team: Team | None, tell: Callable[[Failed], None]) -> Watchdog:
    """Ends this process when a step takes too long."""
    timeout = args.watchdog_timeout or (math.inf if args.device in EMULATED else STEP_S)

    def expire(seconds: float) -> None:
        why = f"a step has not ended for {seconds:.0f} s (--watchdog-timeout); stacks are in the log"
        tell(Failed(why if team is None else team.stuck(why)))
        zmq.Context.instance().destroy(linger=1000)
        os._exit(1)

    return Watchdog(timeout, expire, min(CHECK_S, timeout / 4))


def _serve(engine: Engine, inbox: zmq.Socket, outbox: zmq.Socket, parent: int, watchdog: Watchdog) -> None:
    while os.getppid() == parent:
        while inbox.poll(0 if engine.has_work else IDLE_POLL_MS):
            if answer := _receive(engine, inbox.recv()):
                outbox.send(encode(answer))
        with watchdog.watching():
            outputs = engine.step()
        if outputs:
            outbox.send(encode(Outputs(outputs, engine.statistics())))
    log.info("the api process is gone; the engine ends")


def _receive(engine: Engine, frame: bytes) -> Flushed | None:
    """Do what a message says; what is to be answered at once."""
    try:
        message = decode_to_engine(frame)
        if isinstance(message, FlushCache):
            return Flushed(engine.flush())
        if isinstance(message, Abort):
            engine.abort(message.rid)
        elif isinstance(message, Vocabulary):
            engine.grammars.learn(message)
        else:
            engine.add(message)
    except ValueError:  # of msgspec's or of add(): a defect of the sender, and no reason to fail the others
        log.exception("a message to the engine was dropped")
    return None


def emulation(args: ServerArgs) -> contextlib.AbstractContextManager[Any]:
    """What a rank has to run within."""
    return wave64.emulate(args.device) if args.device in EMULATED else contextlib.nullcontext()


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
