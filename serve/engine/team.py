"""Rank 0's side of the other ranks: it starts those of its host, meets all, hands out steps, and watches over them.

A rank that is gone, says that it has failed, or is silent for too long ends the engine: a thread of its own tells the
api process which rank it was and what it was doing, since the main thread may wait for that rank in a collective.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import zmq

from wave64 import distributed
from wave64.serve.args import ArgsError, ServerArgs
from wave64.serve.engine.control import Beat, Channel, Died, Hello, Refused, Step, Welcome, frame
from wave64.serve.engine.follower import JOIN_S, NO_DEVICE, NOTE_S, START_PATIENCE_S, WAITING, RankInfo
from wave64.serve.engine.introduction import hello, unlike
from wave64.serve.engine.schedule import Schedule
from wave64.serve.messages import Alive, Failed
from wave64.serve.node import address

log = logging.getLogger("wave64")

BEAT_S = 1.0
HELLO_S = 5.0  # how long one that has connected may take to say who it is
BLAME_S = 0.7  # the rank that died first may be the second to be noticed


@dataclass
class Member:
    """Another rank as rank 0 sees it."""

    rank: int
    process: subprocess.Popen[bytes] | None = None  # of this host
    host: str = ""
    pid: int = 0
    device: str = NO_DEVICE
    doing: str = "starting"
    steps: Channel | None = None
    watch: Channel | None = None
    heard: float = field(default_factory=time.monotonic)  # when it last said something
    patience: float = START_PATIENCE_S
    read: int = 0  # bytes of its weights so far, and of all of them
    size: int = 0
    error: str | None = None  # its own words
    gone: bool = False

    def __str__(self) -> str:
        process = self.pid or (self.process.pid if self.process else 0)
        known = f", {self.device}, process {process}" if process else ""
        return f"rank {self.rank} (host {self.host}{known})"


class RankLost(RuntimeError):
    """A rank cannot go on; which, and what it was doing, in one line."""


class Team:
    """The ranks 1 .. tp_size - 1 of an engine. A thread of its own calls `tell`, once a second with what rank 0 is
    doing, and at last with which rank was lost; then it ends the process.

    Raises ArgsError or RankLost when the ranks do not come together.
    """

    def __init__(self, args: ServerArgs, folder: Path, tell: Callable[[Alive | Failed], None],
                 torchrun: str | None = None) -> None:
        """torchrun: its run, where it has started the others; they look for rank 0 in its store."""
        self._args, self._tell = args, tell
        self.doing = "starting"
        self.device = NO_DEVICE
        self._loaded = (0, 0)
        self._me = hello("", 0, args, folder)
        local = args.tp_size // args.nnodes
        self.members = {rank: Member(rank, host=self._me.host if rank < local else f"{rank // local} of --nnodes")
                        for rank in range(1, args.tp_size)}
        self._closing = False
        self._monitor = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._listener = _listen(args, torchrun)
        self.address, port = self._listener.getsockname()[:2]
        self.store = distributed.meet(self.address, 0, first=True)
        if torchrun is not None:
            distributed.meet(*address(args)).set(f"{torchrun}/wave64", f"{self.address}:{port}")
        for rank in range(1, local if torchrun is None else 1):
            self.members[rank].process = self._start(RankInfo(rank, rank, (self.address, port)))
        try:
            self._meet()
        except BaseException:
            self.close()
            raise
        self._monitor.start()

    def say(self, doing: str, device: str | None = None) -> None:
        """What rank 0 does next."""
        self.doing, self.device = doing, device or self.device

    def progress(self, read: int, size: int) -> None:
        """Bytes of weights that rank 0 has read, and of all of its own."""
        self._loaded = read, size

    def loading(self) -> str | None:
        """How far all ranks are; None before and after."""
        ranks = {0: self._loaded} | {m.rank: (m.read, m.size) for m in self.members.values()}
        read, size = (sum(each) for each in zip(*ranks.values(), strict=True))
        if not all(size for _, size in ranks.values()) or read == size:
            return None
        slowest = min(ranks, key=lambda rank: ranks[rank][0] / ranks[rank][1])
        return (f"weights: {read / 1e9:.1f} of {size / 1e9:.1f} GB on {len(ranks)} ranks, {100 * read // size} %; "
                f"rank {slowest} has {100 * ranks[slowest][0] // ranks[slowest][1]} %")

    def begin(self, number: int, schedules: list[Schedule]) -> None:
        """Every rank runs this step. Raises RankLost when one is not there to."""
        sequences, tokens = (sum(map(len, each)) for each in zip(*((s.rows, s.tokens) for s in schedules), strict=True))
        self.say(f"step {number} (sequences: {sequences}, tokens: {tokens})")
        encoded = frame(Step(schedules))
        for member in self.members.values():
            assert member.steps is not None
            try:
                member.steps.send_frame(encoded)
            except OSError as error:
                raise RankLost(f"{member} does not take a step: {error}") from None

    def close(self) -> None:
        """End the ranks of this host; those of others see it."""
        self._closing = True
        for member in self.members.values():
            if member.process is not None and member.process.poll() is None:
                member.process.kill()
                member.process.wait()
            for channel in (member.steps, member.watch):
                if channel is not None:
                    channel.close()
        self._listener.close()

    def blame(self, error: str) -> str:
        """Rank 0 has failed, with this error: the line that says so. If it is another rank's fault, that is noticed
        meanwhile, and the process ends before this returns."""
        time.sleep(2 * BLAME_S)
        return f"{self} failed while {self.doing}: {error}"

    def stuck(self, error: str) -> str:
        """A step does not end: the line that says where all ranks are; those of this host log their stacks, and end."""
        for member in self.members.values():
            if member.process is not None:
                member.process.send_signal(signal.SIGUSR1)
        time.sleep(BLAME_S)
        line = "; ".join([f"{self}: {self.doing}", *(f"{m}: {m.doing}" for m in self.members.values())])
        self.close()
        return f"{error}: {line}"

    def __str__(self) -> str:
        return f"rank 0 (host {self._me.host}, {self.device}, process {self._me.pid})"

    def _start(self, info: RankInfo) -> subprocess.Popen[bytes] | None:
        process = subprocess.Popen([sys.executable, "-m", "wave64.serve.engine.process"], stdin=subprocess.PIPE)
        settings = {"args": asdict(self._args), "rank": asdict(info), "parent": os.getpid()}
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.close()
        return process

    def _meet(self) -> None:
        """Wait until every rank has opened both of its connections."""
        began = noted = time.monotonic()
        self._listener.settimeout(0.2)
        while missing := [m for m in self.members.values() if m.steps is None or m.watch is None]:
            now = time.monotonic()
            if now - noted > NOTE_S:
                noted = now
                log.info("waiting for %s", ", ".join(str(m) for m in missing))
            if now - began > JOIN_S:
                raise RankLost(f"waited {JOIN_S:.0f} s in vain for {', '.join(str(m) for m in missing)}")
            for member in missing:
                if member.process is not None and member.process.poll() is not None:
                    raise RankLost(f"{member} {_ended(member.process)} while {member.doing}; its log is above")
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(None)
            self._admit(Channel(connection))

    def _admit(self, channel: Channel) -> None:
        try:
            said = channel.receive(timeout_s=HELLO_S)
        except (OSError, EOFError, msgspec.DecodeError):  # a ValidationError is one
            channel.close()  # a stranger
            return
        if not isinstance(said, Hello):
            channel.close()
            return
        if difference := unlike(self._me, said):
            channel.send(Refused(difference))
            raise ArgsError(difference)
        member = self.members.get(said.rank)
        if member is None or said.channel not in ("steps", "watch"):
            channel.close()
            return
        if getattr(member, said.channel) is not None:
            with contextlib.suppress(OSError):
                channel.send(Refused(f"{member} is here already: every host needs a --node-rank of its own"))
            channel.close()
            return
        if said.channel == "steps":
            channel.send(Welcome(self.address, self.store.port))
        member.host, member.pid = said.host, said.pid
        setattr(member, said.channel, channel)

    def _watch(self) -> None:
        """The thread: take in what ranks say until one is lost."""
        selector = selectors.DefaultSelector()
        for member in self.members.values():
            assert member.watch is not None
            selector.register(member.watch, selectors.EVENT_READ, member)
            member.heard = time.monotonic()
        told, phase, verdict_at, noted = 0.0, "", 0.0, time.monotonic()
        while not self._closing:
            now = time.monotonic()
            if now - told >= BEAT_S or phase != self.doing.partition(" ")[0]:
                told, phase = now, self.doing.partition(" ")[0]
                self._tell(Alive(f"{self}: {self.doing}"))
            if now - noted >= NOTE_S and (line := self.loading()):
                noted = now
                log.info(line)
            for key, _ in selector.select(0.1):
                member = key.data
                self._take(member)
                if member.gone:
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            lost = [m for m in self.members.values() if m.gone or m.error or self._hangs(m, now)]
            if lost and not verdict_at:
                verdict_at = now + BLAME_S
            if lost and now >= verdict_at and not self._closing:
                self._tell(Failed(self._verdict(lost, now)))
                self._end()

    def _end(self) -> None:
        """Of this process and of the ranks that it has started. What was told is on its way."""
        for member in self.members.values():
            if member.process is not None:
                member.process.kill()
        zmq.Context.instance().destroy(linger=1000)
        os._exit(1)

    def _take(self, member: Member) -> None:
        assert member.watch is not None
        try:
            said = member.watch.receive(timeout_s=5.0)
        except (OSError, EOFError, ValueError):
            member.gone = True
            return
        if isinstance(said, Beat):
            member.device, member.doing = said.device, said.doing
            member.heard, member.patience = time.monotonic(), said.patience_s
            member.read, member.size = said.read, said.size
            kinds = {device.partition(":")[0] for device in (self.device, said.device)} - {NO_DEVICE}
            if len(kinds) > 1:  # they could not exchange a tensor, and would wait for each other
                member.error = f"rank 0 computes on {self.device}; --device has to mean the same on all hosts"
        elif isinstance(said, Died):
            member.device, member.doing, member.error = said.device, said.doing, said.error

    def _verdict(self, lost: list[Member], now: float) -> str:
        """One that vanished took the others with it, one that failed says why, one that hangs says nothing."""
        member = next((m for m in lost if m.gone and not m.error), None) or next((m for m in lost if m.error), lost[0])
        doing = self.doing if member.doing.startswith(("step", WAITING)) else member.doing
        if member.error:
            return f"{member} failed while {doing}: {member.error}"
        if member.gone:
            return f"{member} {_ended(member.process)} while {doing}"
        return f"{member} has not answered for {now - member.heard:.0f} s (--rank-timeout) while {doing}"

    def _hangs(self, member: Member, now: float) -> bool:
        """A rank of this host that someone has stopped is not waited for, whatever it is doing."""
        silence = now - member.heard
        return silence > member.patience or silence > self._args.rank_timeout and _is_stopped(member.process)


def _listen(args: ServerArgs, torchrun: str | None) -> socket.socket:
    """Where ranks of this host look for rank 0, and those of others. Raises ArgsError for an address that is not this
    host's, or in use."""
    where = ("127.0.0.1", 0)
    if torchrun is not None:
        with socket.create_connection(address(args)) as probe:  # the address by which torchrun's store is reached
            where = (probe.getsockname()[0], 0)
    elif args.nnodes > 1:
        where = address(args)
    try:
        return socket.create_server(where, backlog=4 * args.tp_size)
    except OSError as error:
        raise ArgsError(f"--dist-init-addr: cannot listen on {where[0]}:{where[1]}: {error.strerror}; expected an "
                        "address of host 0, and a free port") from None


def _is_stopped(process: subprocess.Popen[bytes] | None) -> bool:
    if process is None:
        return False
    try:
        status = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def _ended(process: subprocess.Popen[bytes] | None) -> str:
    if process is None:
        return "is gone"
    try:
        status = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "has closed its connection"
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name
    hint = ", which is what the kernel sends when memory runs out," if name == "SIGKILL" else ""
    return f"was ended by signal {name}{hint}"
