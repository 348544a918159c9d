"""What memory instructions share: the lanes that take part, as one dimension, and back to registers."""

from collections.abc import Callable

import numpy as np

from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.memory import Space

READ, WRITE, ATOMIC = 1, 2, 4  # what an access does, as bits
#: mnemonic part -> bytes, and the signed type that a load extends from
LOADS = {"ubyte": (1, None), "sbyte": (1, np.int8), "ushort": (2, None), "sshort": (2, np.int16), "dword": (4, None),
         "dwordx2": (8, None), "dwordx3": (12, None), "dwordx4": (16, None)}
#: of loads into half a register
HALF_LOADS = {"ubyte_d16": (1, None), "sbyte_d16": (1, np.int8), "short_d16": (2, None)}
STORES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def active(b: Binding, values: np.ndarray) -> np.ndarray:
    """The values of the lanes that EXEC has: [accesses]."""
    party = b.party
    if values.shape != party.mask.shape:
        values = np.broadcast_to(values, party.mask.shape)
    return values.reshape(-1) if party.full else values[party.mask]


def put(b: Binding, to: np.ndarray, values: np.ndarray) -> None:
    """[accesses] back to the lanes they came from."""
    if b.party.full:
        to[...] = values.reshape(to.shape)
    else:
        to[b.party.mask] = values


def store(b: Binding, space: Space, offsets: np.ndarray, width: int, words: np.ndarray) -> None:
    """Store words [accesses, words] to memory, and report them to the checks."""
    space.store(offsets, width, words)
    for check in b.machine.checks:
        check.stored(b, space, offsets, width, words)


def receive(b: Binding, register: int, width: int, signed: type | None, half: int | None = None,
            agpr: bool = False) -> Callable[[np.ndarray], None]:
    """What writes loaded words [accesses, words] to registers. half: 0 or 1, the other half of the register kept."""
    file = b.party.A if agpr else b.party.V
    count = max(1, width // 4)
    b.note(b.writes, register, count, agpr)
    if half is not None:
        to = file[register].view(np.uint16)[:, half::2]

        def write_half(words: np.ndarray) -> None:
            put(b, to, words[:, 0].astype(signed).astype(np.uint16) if signed else words[:, 0])
        return write_half
    views = list(file[register:register + count])

    def write(words: np.ndarray) -> None:
        if signed:
            words = words.astype(signed).astype(np.int32).view(np.uint32)
        for i, to in enumerate(views):
            put(b, to, words[:, i])
    return write


def give(b: Binding, register: int, width: int, high: bool = False, agpr: bool = False) -> Callable[[], np.ndarray]:
    """What reads registers to words [accesses, words]; high: of sub-dword stores, the upper half."""
    views = b.words(register, max(1, width // 4), agpr)
    limit = np.uint32((1 << 8 * min(width, 4)) - 1)

    def read() -> np.ndarray:
        words = np.stack([active(b, view) for view in views], axis=1)
        if high:
            words = words >> np.uint32(16)
        return words if width >= 4 else words & limit
    return read
