"""The memory through which the hip backend's collectives exchange: an arena of each rank, which all ranks of a group
map.

`connect(group)` allocates this rank's, exchanges handles through torch.distributed, maps the others' and lets every
protocol add something up. Where that is not possible it says why, on every rank alike, and torch.distributed serves the
group. `local` makes all ranks of a group in one process, streams of one GPU: for development.

A wait that times out in a kernel leaves a record in the host's memory; `check()` raises WaitTimeout with its words.
Kernels cannot tell what another rank's data are of: where ranks call different things, they would add up wrong numbers.
So each rank notes its calls, a word each, in memory of the host that all ranks map, and compares: CallsDiffer names
both. That takes about a microsecond of a call, and none of a replayed graph, which counts as one call.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wave64 import distributed, platform
from wave64.backends import hip
from wave64.distributed import Group

log = logging.getLogger("wave64")

TIMEOUT_S = 300.0  # of a wait in a kernel: another rank may compile something first
SELF_TEST_S = 0.4  # of a wait, for each protocol: 2 s for all
MAX_RANKS = 8
MAX_BLOCKS = 128  # of a launch (ranks.h)
SHARED_FILES = Path("/dev/shm")
STATUS_BYTES = 64
LL, LL128, ONE_SHOT, TWO_SHOT = range(4)
PROTOCOLS = {LL: "LL", LL128: "LL128", ONE_SHOT: "one-shot", TWO_SHOT: "two-shot"}
#: what all_reduce's `quantize` asks for -> the protocol, two shots of codes
QUANTIZED = {"fp8": 4, "int8": 5, "int4": 6}
#: operators as a status record numbers them (ranks.h)
OPS = {1: "all_reduce", 2: "fused_all_reduce_rms_norm", 3: "all_gather", 4: "reduce_scatter",
       5: "fused_all_reduce_rms_norm_quant_fp8"}
#: ranks at most -> (bytes at most, protocol): the first row that fits. Larger messages are torch.distributed's. For two
#: ranks by what two linked H200s take (tests/bench/RESULTS_RANKS.md): LL first to 128 KiB, LL128 to 4 MiB. Four and
#: eight were not measured: LL sends twice the bytes, to more ranks; published for MI300X are LL to 64 KiB, LL128 to
#: 2 to 4 MiB.
CHOICE: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((128 << 10, LL), (4 << 20, LL128), (1 << 28, ONE_SHOT)),
    4: ((64 << 10, LL), (1 << 20, LL128), (1 << 28, TWO_SHOT)),
    8: ((32 << 10, LL), (512 << 10, LL128), (1 << 28, TWO_SHOT)),
}
#: the same of sums with a norm, whose rows go by flags where they do not fit LL128's lines (reduced_rows.h), or are
#: quantized. Of two ranks, on the same machine, LL takes 4.9 us of 128 KiB where flags take 5.8, and of 512 KiB 8.0
#: where flags take 6.7; where LL128 begins is as CHOICE, and so are four and eight.
NORM_CHOICE: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((128 << 10, LL), (1 << 20, LL128), (1 << 28, ONE_SHOT)),
    4: ((64 << 10, LL), (1 << 20, LL128), (1 << 28, ONE_SHOT)),
    8: ((32 << 10, LL), (512 << 10, LL128), (1 << 28, ONE_SHOT)),
}


#: as a noted call numbers them: operators, what a replayed graph is, dtypes, codes
_CALLS = {name: number for number, name in OPS.items()} | {"a replayed graph": 15}
_DTYPES = sorted((each for each in vars(torch).values() if isinstance(each, torch.dtype)), key=str)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_CODES = {"none": 0, **{codes: code for code, codes in enumerate(QUANTIZED, 1)}}
NOTED = 1024  # of each rank's last calls; launches of so many that wait on a device do not fit its queue
_NUMBER_BITS, _COUNT_BITS, _DTYPE_BITS, _CODES_BITS = 18, 32, 8, 2
_NUMBER = (1 << _NUMBER_BITS) - 1


class CallsDiffer(RuntimeError):
    """Ranks of a group do not make the same calls; what they exchanged since is void."""


class Calls:
    """What the ranks of a group have called lately, in memory that all of them see: [NOTED, size] words of 8 bytes,
    each with its call's number, operator, codes, dtype and elements, so that it is there as a whole or not at all."""

    def __init__(self, group: Group, memory: mmap.mmap | bytearray) -> None:
        self._group, self._words = group, memoryview(memory).cast("Q")
        self._number, self._agreed = 0, 0  # the last call, and the last one that all ranks have made

    @staticmethod
    def memory_bytes(size: int) -> int:
        """What so many ranks need."""
        return size * NOTED * 8

    def note(self, what: str, dtype: torch.dtype, count: int, quantize: str = "none") -> None:
        """This rank's next call, and what it sends: codes or the numbers. Raises CallsDiffer if another rank's of this
        number, or the one before, is not the same: of two that note theirs at the same time, both may miss the
        other's."""
        number = self._number = self._number + 1
        kind = (_CALLS[what] << _CODES_BITS | _CODES[quantize]) << _DTYPE_BITS | _DTYPE_CODES[dtype]
        size, rank = self._group.size, self._group.rank
        self._words[number % NOTED * size + rank] = (kind << _COUNT_BITS | count) << _NUMBER_BITS | number & _NUMBER
        if self._agreed < number - 1:
            self.compare(number - 1)
        self.compare(number)

    def compare(self, number: int | None = None) -> None:
        """Raises CallsDiffer if another rank has noted another call of this number; None: of this rank's last."""
        number = self._number if number is None else number
        size, at = self._group.size, number % NOTED
        words = self._words[at * size : (at + 1) * size].tolist()
        mine = words[self._group.rank]
        if words.count(mine) == size:
            self._agreed = number
            return
        for rank, theirs in enumerate(words):
            if theirs != mine and theirs and theirs & _NUMBER == number & _NUMBER:
                raise CallsDiffer(f"call {number} in group {self._group.name}: rank {rank} calls {_described(theirs)}, "
                                  f"rank {self._group.rank} calls {_described(mine)}; every rank has to make the same "
                                  "calls in the same order, on tensors of the same size and dtype, sent alike")


def _described(word: int) -> str:
    fields = []
    for bits in (_NUMBER_BITS, _COUNT_BITS, _DTYPE_BITS, _CODES_BITS):
        fields.append(word & (1 << bits) - 1)
        word >>= bits
    _, count, dtype, codes = fields
    what = next(name for name, number in _CALLS.items() if number == word)
    of = "rows" if what == "a replayed graph" else str(_DTYPES[dtype]).removeprefix("torch.")
    return f"{what} of {count} {of}" + (f" as {[*_CODES][codes]}" if codes else "")


class WaitTimeout(RuntimeError):
    """A rank waited in vain for another one in a kernel; what the kernels of this process exchanged since is void."""


@dataclass
class Peers:
    """A group whose ranks reach each other's memory."""

    group: Group
    arenas: tuple[int, ...]  # of all ranks, as this process maps them
    record: tuple[int, int]  # the status record, as the host finds it and the device
    timeout_s: float
    calls: Calls | None = None  # None: the ranks have no memory of the host in common
    release: list[Callable[[], object]] = field(default_factory=list)
    max_blocks: int = MAX_BLOCKS

    def __post_init__(self) -> None:
        self._rows, self._norm_rows = (next(table[size] for size in sorted(table) if self.group.size <= size)
                                       for table in (CHOICE, NORM_CHOICE))
        self.max_bytes = self._rows[-1][0]
        self.wait_at_most(self.timeout_s)

    def wait_at_most(self, seconds: float) -> None:
        """Bounds waits in kernels that are launched from here on; graphs keep what they captured."""
        arch = platform.arch()
        per_second = 100e6 if arch is not None and arch.name.startswith("gfx") else 1e9
        self.timeout_s = seconds
        self.fields = {"arenas": self.arenas, "rank": self.group.rank, "world": self.group.size,
                       "status": self.record[1], "timeout": int(seconds * per_second),
                       "max_blocks": self.max_blocks}

    def protocol(self, size: int, quantize: str = "none") -> int:
        """How to exchange messages of `size` bytes, as codes on request."""
        if quantize != "none":
            return QUANTIZED[quantize]
        return next(protocol for limit, protocol in self._rows if size <= limit)

    def norm_protocol(self, size: int) -> int:
        """How to exchange messages of `size` bytes whose sum is normalized."""
        return next(protocol for limit, protocol in self._norm_rows if size <= limit)

    def note(self, op: str, x: Tensor, quantize: str = "none") -> None:
        """This rank calls an operator next, and sends x as `quantize` says. Raises CallsDiffer where another rank calls
        something else."""
        if self.calls is not None:
            self.calls.note(op, x.dtype, x.numel(), quantize)

    def check(self) -> None:
        """Raises CallsDiffer if another rank has called something else, WaitTimeout if a wait of a kernel that has
        ended timed out."""
        if self.calls is not None:
            self.calls.compare()
        broken, op, number, block, rank = struct.unpack("5i", ctypes.string_at(self.record[0], 20))
        if broken:
            raise WaitTimeout(f"rank {self.group.rank} waited {self.timeout_s:g} s for rank {rank} of group "
                              f"{self.group.name} in {OPS.get(op, op)}, round {number} of block {block}")

    def close(self) -> None:
        """Unmap and free."""
        while self.release:
            self.release.pop()()


#: by group: its peers, or why torch.distributed serves it
_KNOWN: dict[str, Peers | str] = {}


def of(group: str) -> Peers:
    """A connected group's. Raises KeyError for another."""
    found = _KNOWN[group]
    if isinstance(found, str):
        raise KeyError(f"{group}: {found}")
    return found


def reason(group: str) -> str | None:
    """None, or why kernels cannot serve a group."""
    found = _KNOWN.get(group)
    if found is None:
        size = distributed.member(group).size
        return "a rank alone exchanges nothing" if size == 1 else f"group {group} is not connected"
    return found if isinstance(found, str) else None


def too_large(group: str, x: Tensor) -> str | None:
    """None, or why kernels cannot serve `x` in a group."""
    why = reason(group)
    if why is None and x.nbytes > (limit := of(group).max_bytes):
        why = f"torch.distributed exchanges messages of more than {limit >> 20} MiB"
    return why


def check() -> None:
    """Raises CallsDiffer or WaitTimeout, as each group's `check`. Costs nothing but a look at memory."""
    for each in _KNOWN.values():
        if isinstance(each, Peers):
            each.check()


def note_replay(rows: int) -> None:
    """This rank replays a graph of so many rows next, with all the calls that it holds. Raises CallsDiffer where
    another rank of any group calls something else, or replays another."""
    for each in _KNOWN.values():
        if isinstance(each, Peers) and each.calls is not None:
            each.calls.note("a replayed graph", torch.uint8, rows)


def disconnect(group: str, why: str) -> None:
    """Let torch.distributed serve a group, for this reason."""
    found, _KNOWN[group] = _KNOWN.get(group), why
    if isinstance(found, Peers):
        found.close()


def connect(group: str, device: torch.device, timeout_s: float = TIMEOUT_S) -> str | None:
    """Let the kernels of this group's ranks reach each other's memory. Every rank calls it, outside of captures.

    group      a registered name
    device     whose memory this rank's is; of an emulated device, the CPU
    timeout_s  how long a kernel waits for another rank
    returns    None, or why that cannot be and torch.distributed serves the group: the same words on every rank
    """
    began, refused = time.monotonic(), _refused(group)
    disconnect(group, "is being connected")
    why = refused or _connect(group, device)
    if why is None:
        found = of(group)
        why = _self_test(found, device)
        found.wait_at_most(timeout_s)
    if why is not None:
        disconnect(group, why)
        return why
    distributed.at_leave(lambda: disconnect(group, "has been left"))
    found = of(group)
    log.info("group %s: %d ranks reach each other's memory, %d MiB of each (%.1f s)", group, found.group.size,
             _arena_bytes() >> 20, time.monotonic() - began)
    return None


def local(name: str, size: int, device: torch.device, timeout_s: float = TIMEOUT_S) -> list[str]:
    """For development: all ranks of a group in this process, on one GPU, each under a name of its own, which are
    returned in the order of the ranks. Each rank's calls have to be made on a stream of its own."""
    with _on(device):
        blocks = blocks_that_fit(size, torch.cuda.get_device_properties(device).multi_processor_count)
        arenas, memory = tuple(hip._hip.allocate_shared(_arena_bytes()) for _ in range(size)), bytearray(
            Calls.memory_bytes(size))
        groups = [distributed.register(Group(f"{name}.{rank}", rank, size)) for rank in range(size)]
        for arena, group in zip(arenas, groups, strict=True):
            record = hip._hip.allocate_mapped(STATUS_BYTES)
            release = [lambda at=arena: hip._hip.free_shared(at), lambda at=record[0]: hip._hip.free_mapped(at)]
            _KNOWN[group.name] = Peers(group, arenas, record, timeout_s, Calls(group, memory), release, blocks)
            distributed.at_leave(lambda name=group.name: disconnect(name, "has been left"))
    return [group.name for group in groups]


def blocks_that_fit(size: int, units: int) -> int:
    """Blocks of a launch, so that those of `size` ranks, which wait for each other, fit on a card of so many compute
    units at a time. Two ranks' kernels take few enough registers for two blocks to a unit; one fits in any case. Raises
    ValueError where not even a block of each rank fits."""
    if size > units:
        raise ValueError(f"size: expected at most {units} ranks on a card of {units} compute units, since each has a "
                         f"block there that waits for the others', got {size}")
    return min(MAX_BLOCKS, (2 if size == 2 else 1) * units // size)


def _arena_bytes() -> int:
    return hip.constants("all_reduce").ARENA_BYTES


def _on(device: torch.device) -> Any:
    """The runtime's calls inside are this device's, which torch has made ready."""
    if device.type != "cuda":
        return contextlib.nullcontext()  # an emulated device, which is in use
    torch.zeros(1, device=device)
    return torch.cuda.device(device)


def _agree(group: str, mine: str | None) -> str | None:
    """The first rank's reason, where any has one; it is the same on all."""
    said = distributed.said(mine, group)
    return next((f"rank {rank}: {why}" for rank, why in enumerate(said) if why), None)


def _refused(group: str) -> str | None:
    """Why this cannot be, as every rank sees it without asking the others."""
    size = distributed.member(group).size
    if not 2 <= size <= MAX_RANKS:
        return f"a group of {size} ranks; kernels are for 2 to {MAX_RANKS}"
    return None


def _missing(device: torch.device) -> str | None:
    """Why this rank has no such kernels."""
    emulated = platform.emulated()
    why = hip.reason(device.type) if emulated is None else hip.emulated_reason(emulated.arch.name)
    return why or (None if hip.constants("all_reduce") else "this build has no kernel of all_reduce")


def _identity(device: torch.device) -> tuple[str, str]:
    """Which host, and which device of it."""
    host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if device.type != "cuda":
        return host, f"{platform.device_name()} of process {os.getpid()}"
    return host, str(torch.cuda.get_device_properties(device).uuid)


def _connect(group: str, device: torch.device) -> str | None:
    """Makes the group known as `Peers`, not yet tested; or why not."""
    made = _Made(distributed.member(group))
    why = _agree(group, _attempt(lambda: made.allocate(device)))
    if why is None:
        said = distributed.said((*_identity(device), made.handle), group)
        why = _not_shareable(said) or _agree(group, _attempt(lambda: _unreachable(said, device)))
        if why is None:
            why = _agree(group, _attempt(lambda: made.map([handle for *_, handle in said], device)))
    if why is not None:
        made.undo()
        return why
    _KNOWN[group] = Peers(made.group, tuple(made.arenas), made.record,
                          SELF_TEST_S if device.type == "cuda" else TIMEOUT_S, _common_calls(made.group), made.release)
    return None


def _common_calls(group: Group) -> Calls | None:
    """Where the ranks note their calls: in a file that goes when all have mapped it. None where they have none in
    common, as in containers of their own; every rank comes to the same."""
    size, path, found = Calls.memory_bytes(group.size), "", []

    def make() -> None:
        nonlocal path
        with tempfile.NamedTemporaryFile(dir=SHARED_FILES if SHARED_FILES.is_dir() else None, prefix="wave64-",
                                         delete=False) as file:  # fmt: skip
            path = file.name
            file.truncate(size)

    def map_it() -> None:
        with open(path, "r+b") as file:
            found.append(mmap.mmap(file.fileno(), size))

    why = _agree(group.name, _attempt(make) if group.rank == 0 else None)
    if why is None:
        mine, path = path, distributed.said(path, group.name)[0]
        why = _agree(group.name, _attempt(map_it))
        path = mine
    if path:
        os.unlink(path)
    if why is not None:
        log.info("group %s: calls of its ranks are not compared: %s", group.name, why)
        return None
    return Calls(group, found[0])


def _attempt(act: Callable[[], str | None]) -> str | None:
    """What `act` says, or what it raises: the other ranks wait to hear it."""
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Made:
    """What a rank has so far."""

    def __init__(self, group: Group):
        self.group, self.arenas, self.handle, self.record = group, [0] * group.size, b"", (0, 0)
        self.release: list[Callable[[], object]] = []

    def allocate(self, device: torch.device) -> str | None:
        if why := _missing(device):
            return why
        with _on(device):
            mine = hip._hip.allocate_shared(_arena_bytes())
            self.release.append(lambda: hip._hip.free_shared(mine))
            self.arenas[self.group.rank] = mine
            self.handle = hip._hip.export_shared(mine)
            self.record = hip._hip.allocate_mapped(STATUS_BYTES)
            self.release.append(lambda: hip._hip.free_mapped(self.record[0]))
        return None

    def map(self, handles: list[bytes], device: torch.device) -> None:
        with _on(device):
            for rank, handle in enumerate(handles):
                if rank != self.group.rank:
                    self.arenas[rank] = at = hip._hip.open_shared(handle)
                    self.release.append(lambda at=at: hip._hip.close_shared(at))

    def undo(self) -> None:
        while self.release:
            self.release.pop()()


def _not_shareable(said: list[tuple[str, str, bytes]]) -> str | None:
    """Why ranks that say this cannot share memory."""
    if len({host for host, *_ in said}) > 1:
        return "its ranks are on several hosts"
    devices = [device for _, device, _ in said]
    for rank, device in enumerate(devices):
        if device in devices[:rank]:
            return f"ranks {devices.index(device)} and {rank} have the same GPU"
    return None


def _unreachable(said: list[tuple[str, str, bytes]], device: torch.device) -> str | None:
    """Which GPU this one's memory is out of reach of; None where all reach it, or this process does not see them."""
    if device.type != "cuda":
        return None
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    mine = visible[_identity(device)[1]]
    for rank, (_, uuid, _) in enumerate(said):
        if (other := visible.get(uuid, mine)) != mine and not hip._hip.can_access_peer(mine, other):
            return f"GPU {mine} does not reach memory of rank {rank}'s GPU {other}"
    return None


def _self_test(peers: Peers, device: torch.device) -> str | None:
    """Add something up by each protocol of the group's table; None, or what is wrong, the same on all ranks."""
    group, size = peers.group.name, peers.group.size
    protocols = list(dict.fromkeys(protocol for _, protocol in peers._rows))
    wanted = torch.arange(517, dtype=torch.float32).mul_(size).add_(size * (size - 1) // 2)
    made: list[Tensor] = []

    def prepare() -> None:
        """What takes long the first time, so that the ranks' launches come at the same time."""
        made.append(torch.arange(517, dtype=torch.float32).add_(peers.group.rank).to(device))
        made.extend(torch.full_like(made[0], float("nan")) for _ in protocols)
        hip._hip.load("all_reduce")

    def add_up() -> str | None:
        for protocol, out in zip(protocols, made[1:], strict=True):
            launch_all_reduce(peers, made[0], out, protocol)
            got = out.cpu()
            peers.check()
            if not torch.equal(got, wanted):
                wrong = int((got != wanted).sum())
                return f"the self-test of {PROTOCOLS[protocol]}: {wrong} of {got.numel()} sums are wrong"
        return None

    with _on(device):
        return _agree(group, _attempt(prepare)) or _agree(group, _attempt(add_up))


def launch_all_reduce(peers: Peers, x: Tensor, out: Tensor, protocol: int) -> None:
    """out = the sum of x over the ranks, by this protocol. out may be x."""
    hip.launch("all_reduce", **peers.fields, x=x, out=out, count=x.numel(), dtype=x.dtype, protocol=protocol)
