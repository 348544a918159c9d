"""How a group's ranks come to reach each other's memory, with stand-ins for the runtime and the other rank: what is
chosen by size, what is refused in words, and that nothing stays allocated."""

from types import SimpleNamespace

import pytest
import torch

from wave64 import distributed
from wave64.backends import peers
from wave64.distributed import Group

CPU, HOST = torch.device("cpu"), "host"


class Runtime:
    """HIP's, as far as peers asks; `fails` names the call that does not succeed. held: what is not given back."""

    def __init__(self, fails: str = ""):
        self.fails, self.held, self.number = fails, set(), 4096

    def _made(self, name: str):
        if name == self.fails:
            raise RuntimeError(f"HIP: {name}")
        self.number += 4096
        self.held.add(self.number)
        return self.number

    def allocate_shared(self, size: int) -> int:
        return self._made("allocate_shared")

    def export_shared(self, at: int) -> bytes:
        if self.fails == "export_shared":
            raise RuntimeError("HIP: export_shared")
        return b"handle"

    def allocate_mapped(self, size: int) -> tuple[int, int]:
        self.record = torch.zeros(size, dtype=torch.uint8)
        self._made("allocate_mapped")
        self.held.remove(self.number)
        self.held.add(self.record.data_ptr())
        return self.record.data_ptr(), self.record.data_ptr()

    def open_shared(self, handle: bytes) -> int:
        return self._made("open_shared")

    def give_back(self, at: int) -> None:
        self.held.remove(at)

    free_shared = free_mapped = close_shared = give_back

    def load(self, op: str) -> None:
        """Code objects are no memory of a rank's."""


@pytest.fixture
def connected(monkeypatch):
    """Connects rank 0 of the group "pair"; the other rank says the same, from another device of this host. wrong: sums
    that the kernels get wrong."""

    def connect(runtime: Runtime, host: str = HOST, device: str = "1", wrong: int = 0) -> str | None:
        def launch(op, x, out, **fields):
            out.copy_(2 * x + 1)
            out[:wrong] += 1

        def both(group, mine):
            return [mine, (host, device, b"theirs") if isinstance(mine, tuple) else None]

        monkeypatch.setattr(peers, "hip", SimpleNamespace(
            _hip=runtime, launch=launch, reason=lambda kind: None,
            constants=lambda op: SimpleNamespace(ARENA_BYTES=1 << 21)))
        monkeypatch.setattr(peers, "_identity", lambda device: (HOST, "0"))
        monkeypatch.setattr(peers, "_all", both)
        distributed.register(Group("pair", 0, 2))
        return peers.connect("pair", CPU, timeout_s=7.0)

    yield connect
    distributed.leave()
    peers._KNOWN.clear()


def test_ranks_are_connected_until_they_leave(connected):
    runtime = Runtime()
    assert connected(runtime) is None
    found = peers.of("pair")
    assert (found.timeout_s, found.fields["timeout"], len(runtime.held)) == (7.0, 7_000_000_000, 3)
    assert found.fields["arenas"] == (8192, 16384)
    first = set(runtime.held)
    assert connected(runtime) is None
    assert len(runtime.held) == 3
    assert not first & (runtime.held - {peers.of("pair").record[0]})
    distributed.leave()
    assert not runtime.held
    assert peers.reason("pair") == "has been left"


@pytest.mark.parametrize("call", ["allocate_shared", "export_shared", "allocate_mapped", "open_shared"])
def test_a_call_that_fails_leaves_nothing_behind(connected, call):
    runtime = Runtime(fails=call)
    words = f"rank 0: RuntimeError: HIP: {call}"
    assert connected(runtime) == peers.reason("pair") == words
    assert not runtime.held


@pytest.mark.parametrize(("other", "words"), [
    (dict(host="another"), "its ranks are on several hosts"),
    (dict(device="0"), "ranks 0 and 1 have the same GPU"),
    (dict(wrong=3), "rank 0: the self-test of LL: 3 of 517 sums are wrong")])
def test_ranks_that_cannot_share_memory_say_why(connected, other, words):
    runtime = Runtime()
    assert connected(runtime, **other) == peers.reason("pair") == words
    assert not runtime.held
    with pytest.raises(KeyError, match=words):
        peers.of("pair")


def test_the_first_rank_that_cannot_is_named_on_all(monkeypatch):
    monkeypatch.setattr(peers, "_all", lambda group, mine: [None, "out of memory", mine])
    assert peers._agree("any", "mine") == peers._agree("any", None) == "rank 1: out of memory"


@pytest.mark.parametrize("size", range(2, peers.MAX_RANKS + 1))
def test_a_table_says_which_protocol_takes_how_many_bytes(connected, size):
    found = peers.Peers(Group("pair", 0, size), (), (0, 0), 1.0)
    rows = peers.CHOICE[min(ranks for ranks in peers.CHOICE if ranks >= size)]
    assert [limit for limit, _ in rows] == sorted({limit for limit, _ in rows})
    for i, (limit, protocol) in enumerate(rows):
        assert found.protocol(limit) == protocol
        if i + 1 < len(rows):
            assert found.protocol(limit + 1) == rows[i + 1][1]


def test_torch_takes_what_is_larger_than_the_table_says(connected):
    assert connected(Runtime()) is None
    limit = peers.of("pair").max_bytes
    assert peers.too_large("pair", torch.empty(limit, dtype=torch.uint8, device="meta")) is None
    assert peers.too_large("pair", torch.empty(limit + 1, dtype=torch.uint8, device="meta")) == (
        "torch.distributed exchanges messages of more than 256 MiB")
