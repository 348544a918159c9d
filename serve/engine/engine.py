"""The engine: a model, its runner and a scheduler behind add(), abort() and step(); and the process around them.

A step is three verbs: schedule, run, commit. In `Engine.step` they follow each other, or overlap: a step is scheduled,
and its model runs, before the one in front of it is committed. `Engine` is whole in one process, for tests and offline
use; `run_engine` is what the api process starts, with `messages` going in and out over ZeroMQ.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable

import msgspec
import torch
import zmq

from wave64 import platform
from wave64.arch import EMULATED
from wave64.backends import peers
from wave64.serve.args import ServerArgs
from wave64.serve.engine.grammar import Grammars
from wave64.serve.engine.pace import Pace
from wave64.serve.engine.pages import PagePool
from wave64.serve.engine.profiling import Profiler
from wave64.serve.engine.rank import Rank, one_line, prefill_budget, refuse, set_threads, surroundings, use_interface
from wave64.serve.engine.sampler import Chosen
from wave64.serve.engine.schedule import Schedule
from wave64.serve.engine.scheduler import Scheduler, Sequence, group_of
from wave64.serve.engine.team import Team
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
    Profiled,
    Ready,
    Request,
    StartProfile,
    Statistics,
    StopProfile,
    Vocabulary,
    check_request,
    decode_to_engine,
    encode,
)

log = logging.getLogger("wave64")

IDLE_POLL_MS = 1000  # how often an idle engine looks whether its parent is still there
STEP_S = 300.0  # how long a step may take, besides compiling
REPORT_S = 5.0  # a busy engine says how fast it is this often, at most
# By which prompts may prolong a GPU's steps. Answers then come at some ten tokens a second while prompts are computed,
# as fast as they are read; and a chunk is still so long (3,800 tokens of an 8B model on an H200) that products are not
# slower than in the longest ones.
MAX_PREFILL_MS = 100.0


class Throughput:
    """What a busy engine says of itself every few seconds; rates are of the time that steps took."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reported = clock()
        self._began = self._busy = 0.0
        self._prompt = self._generated = 0
        self.steps, self.seconds = 0, 0.0  # in all

    def begin(self) -> None:
        """A step begins."""
        self._began = self._clock()

    def end(self, prompt: int, generated: int) -> str | None:
        """A step ends that computed so many prompt tokens and generated so many; a line, if it is time for one."""
        now = self._clock()
        self.steps += 1
        self.seconds += now - self._began
        self._busy += now - self._began
        self._prompt += prompt
        self._generated += generated
        if now - self._reported < REPORT_S or not self._busy:
            return None
        rates = (self._prompt / self._busy, self._generated / self._busy)
        self._reported, self._busy, self._prompt, self._generated = now, 0.0, 0, 0
        return "throughput: {:.1f} prompt and {:.1f} generated tokens/s".format(*rates)


class Engine:
    """Continues token sequences. Not thread-safe; nothing runs between calls of step().

    team: the other ranks, where this is rank 0 of several. overlap: whether a step is scheduled and its model started
    before the one in front of it is committed; None: on a GPU, unless the flags say otherwise. The tokens are the same.

    Raises ArgsError, ConfigError, WeightsError or NotSupported, each in one line for the operator, when it cannot be
    built.
    """

    def __init__(self, args: ServerArgs, team: Team | None = None, overlap: bool | None = None) -> None:
        rank = Rank(args) if team is None else Rank(args, store=team.store, say=team.say, progress=team.progress)
        self.team, self._steps = team, 0
        self.device, self.config, self.dtype, self.runner = rank.device, rank.config, rank.dtype, rank.runner
        self._backends, self.is_gpu = rank.backends, rank.is_gpu
        self.overlaps = overlap
        if overlap is None:
            self.overlaps = self.device.type == "cuda" and not args.disable_overlap_schedule
        pools = [PagePool(rank.num_pages, args.page_size) for _ in range(args.groups)]
        self.limits = Limits(self.config.context_length, pools[0].num_tokens, self.config.vocab_size)
        budget = prefill_budget(args, self.config.context_length, self.is_gpu)
        self.schedulers = [Scheduler(pool, rank.max_running, budget, policy=args.schedule_policy,
                                     reuse_prefixes=not args.disable_radix_cache,
                                     host_pool=PagePool(rank.host_pages, args.page_size) if rank.host_pages else None)
                           for pool in pools]  # fmt: skip
        self.scheduler, self.pool = self.schedulers[0], pools[0]  # all there is, but with data-parallel attention
        self._eos = frozenset(i for i in self.config.eos_token_ids if i < self.config.vocab_size)
        self.grammars = Grammars(self.config.vocab_size, self._eos)
        self._seeds = random.Random(args.random_seed)
        self._refused: list[Output] = []
        self._throughput = Throughput()
        limit_ms = args.max_prefill_ms
        if limit_ms is None:
            limit_ms = MAX_PREFILL_MS if self.device.type == "cuda" else 0.0
        self._pace = Pace(limit_ms, self.scheduler.prefill_budget)
        self._prompt_tokens = self._generated_tokens = 0  # computed, generated
        self._chosen: list[Chosen] | None = None  # of the step on its way: what each group samples in it
        if team is not None:
            team.say("waiting for requests")

    def ready(self) -> Ready:
        """What a client may ask of this engine, what the model recommends, and which backends serve it."""
        return Ready(
            **msgspec.structs.asdict(self.limits),
            device=platform.device_name() if self.is_gpu else "cpu",
            dtype=str(self.dtype).removeprefix("torch."),
            backends=self._backends,
            sampling_defaults=self.config.sampling_defaults,
        )

    @property
    def has_work(self) -> bool:
        """Whether step() has something to run or to say."""
        return bool(any(map(len, self.schedulers)) or self._refused or self.grammars or self._chosen is not None)

    def add(self, request: Request) -> None:
        """Queue a request. One that cannot be served is answered by the next step(), with finish_reason "error".

        Raises ValueError if a live request has the same rid: one could not tell which answers are whose.
        """
        if any(request.rid in live for live in (*self.schedulers, self.grammars)):
            raise ValueError(f"request {request.rid!r} is already there; every live request needs its own rid")
        params = request.params
        try:
            check_request(request.input_ids, params, self.limits, logprob_ids=request.logprob_ids)
        except BadRequest as error:
            self._refused.append(Output(request.rid, [], "error", error=str(error)))
            return
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        seq = Sequence(request, stops, random.Random(seed))
        if request.grammar is None:
            group_of(seq, self.schedulers).add(seq)
        else:
            self.grammars.attach(request.rid, seq, request.grammar)

    def abort(self, rid: str) -> None:
        """Forget a request and free its pages at once; no Output follows. An unknown rid is ignored."""
        self.grammars.forget(rid)
        for scheduler in self.schedulers:
            scheduler.abort(rid)

    def flush(self) -> bool:
        """Empty the prefix cache, if no request is there; whether it was done."""
        return not self.grammars and all([scheduler.flush() for scheduler in self.schedulers])

    def step(self) -> list[Output]:
        """Run one step, if there is work; what was sampled: in this step, or with overlap in the one before, whose
        results come while this one's model runs. What fails in a step fails the requests that took part in it, and no
        others; among several ranks, whose states would differ from there on, it is raised."""
        outputs, self._refused = self._refused, []
        for rid, seq, wrong in self.grammars.ready(is_idle=not any(map(len, self.schedulers))):
            if wrong is None:
                group_of(seq, self.schedulers).add(seq)
            else:
                outputs.append(Output(rid, [], "error", error=wrong))
        if not any(map(len, self.schedulers)) and self._chosen is None:
            return outputs
        self._throughput.begin()
        before = self._prompt_tokens, self._generated_tokens
        chunk = None
        if any(scheduler.is_decoding for scheduler in self.schedulers):
            is_full = any(scheduler.is_full for scheduler in self.schedulers)
            waiting = max(scheduler.prompt_tokens for scheduler in self.schedulers)
            chunk = self._pace.chunk if is_full else self._pace.chunk_of(waiting)
        steps = [scheduler.schedule(chunk) for scheduler in self.schedulers]
        if any(step.rows for step in steps):
            outputs += self._run(steps)
        else:  # all that are left have their last token on its way
            for scheduler in self.schedulers:
                scheduler.drop()
            outputs += self._commit()
        if line := self._throughput.end(self._prompt_tokens - before[0], self._generated_tokens - before[1]):
            now = self.statistics()
            log.info("%s; %d running, %d waiting, %d of %d KV pages in use", line, now.running, now.waiting,
                     now.pages_used, now.pages_total)
        if self.team is not None and not self.has_work:
            self.team.say("waiting for requests")
        return outputs

    def _run(self, steps: list[Schedule]) -> list[Output]:
        """Compute a step's logits and choose its tokens. With overlap the step before is committed in between: while
        the device computes, and early enough for what its tokens say of how the next ones are chosen."""
        self._steps += 1
        prompts = [sum(step.counts[step.num_decodes :]) for step in steps]
        self._pace.begin(any(step.num_decodes for step in steps), max(prompts))
        try:
            if self.team is not None:
                self.team.begin(self._steps, steps)
            early = {"sampling": self.scheduler.early_sampling()} if self.runner.chooses else {}
            logits = self.runner.forward(*steps, **early)
        except Exception as error:
            return self._commit() + self._failed(error)
        self._prompt_tokens += sum(prompts)
        outputs = self._commit()
        try:
            self._chosen = self.runner.sample(logits, steps, [scheduler.sampling() for scheduler in self.schedulers])
        except Exception as error:
            return outputs + self._failed(error)
        return outputs if self.overlaps else self._commit()

    def _commit(self) -> list[Output]:
        """Wait for what a step on its way has sampled, if there is one, and commit it."""
        if self._chosen is None:
            return []
        chosen, self._chosen = self._chosen, None
        sampled = [each.wait() for each in chosen]
        self._pace.end()
        peers.check()
        self._generated_tokens += sum(len(each.ids) for each in sampled)
        return [output for scheduler, each in zip(self.schedulers, sampled, strict=True)
                for output in scheduler.commit(each)]  # fmt: skip

    def _failed(self, error: Exception) -> list[Output]:
        """What the requests of the step scheduled last are answered."""
        self._pace.drop()
        if self.team is not None:
            raise error
        log.error("a step failed", exc_info=error)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # raises if the device itself is lost: then there is no going on
        why = f"the engine failed while computing this request: {type(error).__name__}: {error}"
        return [Output(seq.request.rid, [], "error", error=why) for seq in self.scheduler.drop()]

    def statistics(self) -> Statistics:
        """The state of the engine between two steps."""
        each = [(len(s.running), len(s.waiting), s.pool.num_pages - s.cache.num_available, s.pool.num_pages,
                 s.preemptions, s.cached_tokens, s.cache.num_pages) for s in self.schedulers]  # fmt: skip
        running, waiting, used, pages, *totals = map(sum, zip(*each, strict=True))
        return Statistics(running, waiting, used, pages, self._prompt_tokens, self._generated_tokens, *totals,
                          steps=self._throughput.steps, step_seconds=self._throughput.seconds)  # fmt: skip


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
            reader = stack.enter_context(surroundings(args))
            team = _team(args, outputs, torchrun) if args.tp_size > 1 else None
            engine = Engine(args, team)
            threads(engine.runner.weight_bytes)
            if reader is not None:
                log.info(reader.summary())
                reader.is_serving = True
            gc.collect()
            gc.freeze()  # a collection would look at all that torch has imported, in the middle of a step
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
    profiler, told = Profiler(), engine.statistics()
    while os.getppid() == parent:
        while inbox.poll(0 if engine.has_work else IDLE_POLL_MS):
            if answer := _receive(engine, profiler, inbox.recv()):
                outbox.send(encode(answer))
        with watchdog.watching():
            outputs = engine.step()
        profiler.step()
        now = engine.statistics()
        if outputs or now != told:  # what was aborted gives none
            outbox.send(encode(Outputs(outputs, now)))
            told = now
    log.info("the api process is gone; the engine ends")


def _receive(engine: Engine, profiler: Profiler, frame: bytes) -> Flushed | Profiled | None:
    """Do what a message says; what is to be answered at once."""
    try:
        message = decode_to_engine(frame)
        if isinstance(message, FlushCache):
            return Flushed(engine.flush())
        if isinstance(message, StartProfile):
            return profiler.start(message)
        if isinstance(message, StopProfile):
            return profiler.stop()
        if isinstance(message, Abort):
            engine.abort(message.rid)
        elif isinstance(message, Vocabulary):
            engine.grammars.learn(message)
        else:
            engine.add(message)
    except ValueError:  # of msgspec's or of add(): a defect of the sender, and no reason to fail the others
        log.exception("a message to the engine was dropped")
    return None
