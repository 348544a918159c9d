"""Races through memory: two workgroups access the same bytes, one of them not only to read and not both by atomics, and
nothing orders them.

What orders them is a release of the first behind its access and, later, an acquire of the second: of workgroups of one
device a write-back, waited for, and an invalidate of the device's scope, of several devices both of the system's.
Stores past the caches release themselves once they were waited for, and loads past the caches need no acquire of their
own. Which flag was passed in between is not asked: a race whose two sides happen to release and acquire for something
else goes unseen. Launches of one stream are ordered, and not compared.

`Unordered` is a check like the others, but not one of `ALL`: it costs several times the run. `execute_together` always
has it.
"""

from bisect import bisect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.lanes import ATOMIC, READ, WRITE, active
from wave64.testing.emulator.memory import EmulationError, Memory
from wave64.testing.emulator.watch import Check

PAGE = 4096
VERB = {READ: "reads", WRITE: "writes", ATOMIC: "changes"}
Times = dict[int, list[int]]


class Page:
    """By byte, of what was done last: who (from 1), and when; of reads those of two workgroups."""

    def __init__(self) -> None:
        self.who = {kind: np.zeros(PAGE, np.int32) for kind in (READ, WRITE, ATOMIC)}
        self.when = {kind: np.zeros(PAGE, np.int64) for kind in (READ, WRITE, ATOMIC)}
        self.other_reader, self.other_read = np.zeros(PAGE, np.int32), np.zeros(PAGE, np.int64)


@dataclass
class Shadow:
    """Who accessed what when, of workgroups that run side by side; time counts accesses. A workgroup's number is its
    place in `names`, from 1."""

    names: list[str] = field(default_factory=lambda: ["none"])
    numbers: dict[tuple, int] = field(default_factory=dict)
    pages: dict[int, Page] = field(default_factory=dict)
    released: Times = field(default_factory=lambda: defaultdict(list))  # by workgroup, when it released
    waited: Times = field(default_factory=lambda: defaultdict(list))    # for all that it had stored
    acquired: Times = field(default_factory=lambda: defaultdict(list))  # and acquired
    writing_back: set[int] = field(default_factory=set)                 # workgroups that have not waited for it yet
    begun: dict[int, int] = field(default_factory=dict)                 # launches that began behind another, and when
    now: int = 0

    def ended(self, launch: int) -> None:
        """All that its workgroups did is released."""
        self.now += 1
        for (of, _), number in self.numbers.items():
            if of == launch:
                self.released[number].append(self.now)

    def began(self, launch: int) -> None:
        """Behind another of its stream: its workgroups, numbered from here on, have acquired what that released."""
        self.now += 1
        self.begun[launch] = self.now

    def number(self, key: tuple, name: str) -> int:
        if key not in self.numbers:
            self.numbers[key] = len(self.names)
            self.names.append(name)
            if key[0] in self.begun:
                self.acquired[self.numbers[key]].append(self.begun[key[0]])
        return self.numbers[key]

    def ordered(self, first: int, when: int, kind: int, second: int, now: int) -> bool:
        """Whether what workgroup `first` did at a time is behind what `second` does now. What is done past the caches,
        of kind ATOMIC, needs a wait instead of a write-back, and no invalidate."""
        releases = [self.released[first]] + [self.waited[first]] * (kind == ATOMIC)
        behind = min((times[at] for times in releases if (at := bisect(times, when)) < len(times)), default=None)
        return behind is not None and (now == ATOMIC or (self.acquired[second] or [0])[-1] >= behind)

    def note(self, addresses: np.ndarray, who: np.ndarray, kind: int) -> tuple[int, int, int] | None:
        """Bytes are accessed. Gives (which of them, kind of the earlier access, who made it) of the first that races.
        """
        self.now += 1
        pages, found = addresses // PAGE, None
        for page in np.unique(pages):
            here = np.flatnonzero(pages == page)
            at, by = addresses[here] % PAGE, who[here]
            shadow = self.pages.setdefault(int(page), Page())
            if found is None and (race := self._race(shadow, at, by, kind)):
                found = (int(here[race[0]]), *race[1:])
            if kind == READ:
                moved = (shadow.who[READ][at] != by) & (shadow.who[READ][at] != 0)
                shadow.other_reader[at[moved]] = shadow.who[READ][at[moved]]
                shadow.other_read[at[moved]] = shadow.when[READ][at[moved]]
            shadow.who[kind][at], shadow.when[kind][at] = by, self.now
            if kind == WRITE and found is None and (lost := np.flatnonzero(shadow.who[kind][at] != by)).size:
                found = int(here[lost[0]]), kind, int(shadow.who[kind][at[lost[0]]])
        return found

    def _race(self, page: Page, at: np.ndarray, by: np.ndarray, kind: int) -> tuple[int, int, int] | None:
        for earlier in {READ: (WRITE, ATOMIC), WRITE: (WRITE, ATOMIC, READ), ATOMIC: (WRITE, READ)}[kind]:
            accesses = [(page.who[earlier][at], page.when[earlier][at])]
            if earlier == READ:
                accesses.append((page.other_reader[at], page.other_read[at]))
            for others, times in accesses:
                for i in np.flatnonzero((others != 0) & (others != by)):
                    first, when = int(others[i]), int(times[i])
                    if not self.ordered(first, when, earlier, int(by[i]), kind):
                        return int(i), earlier, first
        return None


class Unordered(Check):
    """Holds each access to memory against those of other workgroups."""

    def __init__(self, machine):
        super().__init__(machine)
        self.shadow, self.launch, self.batch, self.across = Shadow(), 0, 0, False
        self.buffers: object = None
        self.current: tuple[Binding, int, bool, bool] | None = None

    def start(self) -> None:
        memory = self.machine.memory
        if memory.buffers is not self.buffers:  # another launch
            self.buffers, self.batch, self.shadow = memory.buffers, 0, getattr(memory, "shadow", None) or Shadow()
            self.launch, self.across = getattr(memory, "launch", 0), getattr(memory, "across", False)
            memory.watch = self._accessed
        self.batch += 1

    def _numbers(self, b: Binding) -> np.ndarray:
        """The number of each wave's workgroup."""
        before = (self.batch - 1) * self.machine.shape.groups
        named = f"workgroup {{}} of launch {self.launch}" if self.across else "workgroup {}"
        return np.array([self.shadow.number((self.launch, before + int(group)), named.format(before + int(group)))
                         for group in np.atleast_1d(b.party.group)], np.int32)

    def _note(self, times: Times, b: Binding) -> None:
        self.shadow.now += 1
        for number in set(self._numbers(b).tolist()):
            times[number].append(self.shadow.now)

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        name, family = b.instruction.name, b.instruction.family
        if name == "s_waitcnt" and not b.fields.simm16 & 0xC00F:

            def wait() -> object:
                self._note(self.shadow.waited, b)
                for number in self.shadow.writing_back & set(self._numbers(b).tolist()):
                    self.shadow.released[number].append(self.shadow.now)
                    self.shadow.writing_back.discard(number)
                return execute()
            return wait
        if name in ("buffer_wbl2", "buffer_inv"):
            wide = bool(b.fields.sc1) and (bool(b.fields.sc0) or not self.across)

            def note() -> object:
                if wide:
                    if name == "buffer_inv":
                        self._note(self.shadow.acquired, b)
                    else:
                        self.shadow.writing_back |= set(self._numbers(b).tolist())
                return execute()
            return note
        if family not in ("GLOBAL", "FLAT", "MUBUF", "SMEM"):
            return execute
        kind = ATOMIC if "atomic" in name else WRITE if "_store_" in name else READ
        past = bool(getattr(b.fields, "sc1", 0)) and (bool(getattr(b.fields, "sc0", 0)) or not self.across)

        def run() -> object:
            self.current = (b, kind, past, family == "SMEM")
            try:
                return execute()
            finally:
                self.current = None
        return run

    def stored(self, b: Binding, space: object, offsets: np.ndarray, width: int, words: np.ndarray) -> None:
        """What other checks look at behind a store is no access of the kernel's."""
        self.current = None

    def _accessed(self, addresses: np.ndarray, width: int, which: np.ndarray | None) -> None:
        """Before the access. Flags, which are accessed past the caches or by atomics on both sides, do not race: what
        passes them along is their purpose."""
        if self.current is None:
            return
        b, kind, past, scalar = self.current
        numbers = self._numbers(b)
        who = numbers if scalar else active(b, numbers[:, None])
        if which is not None:
            who = who[which] if who.shape == which.shape else np.broadcast_to(who[:, None], which.shape)[which]
        at = (addresses.view(np.int64)[:, None] + np.arange(width)).reshape(-1)
        who = np.repeat(np.broadcast_to(who, len(addresses)), width)
        found = self.shadow.note(at, who, ATOMIC if past else kind)
        if found:
            octet, earlier, first = found
            memory: Memory = self.machine.memory
            raise EmulationError(
                f"{self.shadow.names[int(who[octet])]} {VERB[kind]} a byte {memory.whereabouts(int(at[octet]))}, which "
                f"{self.shadow.names[first]} {VERB[earlier]}, and no release and acquire is between")
