"""What checks and counters share: the machine calls a `Check` where something is bound, executed, met or accessed."""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.decode import EXEC, M0, SCC, VCC
from wave64.testing.emulator.memory import Space

SCALAR = 1000  # where the scalar registers begin in one numbering of both kinds
NAMES = {VCC: "vcc_lo", VCC + 1: "vcc_hi", M0: "m0", EXEC: "exec_lo", EXEC + 1: "exec_hi", SCC: "scc"}


def registers(ranges: list[tuple[str, int, int]]) -> list[int]:
    """Ranges as a binding notes them, in one numbering: vector registers, then from SCALAR on scalar ones."""
    return [(SCALAR if kind == "s" else 0) + first + i for kind, first, count in ranges for i in range(count)]


def name_of(register: int) -> str:
    return f"v{register}" if register < SCALAR else NAMES.get(register - SCALAR, f"s{register - SCALAR}")


class Check:
    """One that sees nothing; the machine calls these."""

    def __init__(self, machine):
        self.machine = machine

    def start(self) -> None:
        """A batch of workgroups begins."""

    def wrap(self, b: Binding, execute: Callable) -> Callable:
        """What is called instead of `execute`, the bound instruction."""
        return execute

    def ended(self) -> None:
        """All workgroups of the batch have ended; the machine's `counts` say how often each instruction ran."""

    def met(self, groups: np.ndarray) -> None:
        """These workgroups (bool) have come to a barrier, all their waves."""

    def lds(self, b: Binding, offsets: np.ndarray, width: int, access: int, words: np.ndarray | None) -> None:
        """The active lanes are about to access LDS: READ, WRITE (of `words`) or ATOMIC."""

    def scratch(self, b: Binding, offsets: np.ndarray, width: int, writes: bool) -> None:
        """The active lanes are about to access private memory."""

    def stored(self, b: Binding, space: Space, offsets: np.ndarray, width: int, words: np.ndarray) -> None:
        """The active lanes, or those of them inside a buffer's resource, have stored `words` to memory."""

    def buffer_store(self, b: Binding, inside: np.ndarray) -> None:
        """A buffer store is about to write, of the active lanes' accesses those that are inside its resource."""
