"""How a group's ranks come to reach each other's memory, with stand-ins for the runtime and the other rank: what is
chosen by size, what is refused in words, and that nothing stays allocated."""

from types import SimpleNamespace

import pytest
import torch

from wave64 import distributed
from wave64.backends import peers
from wave64.backends.hip_ops.all_reduce import all_reduce
from wave64.distributed import Group
from wave64.ops.all_reduce import QUANTIZED_FROM

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

        def both(mine, group):
            return [mine, (host, device, b"theirs") if isinstance(mine, tuple) else None]

        monkeypatch.setattr(peers, "hip", SimpleNamespace(
            _hip=runtime, launch=launch, reason=lambda kind: None,
            constants=lambda op: SimpleNamespace(ARENA_BYTES=1 << 21)))
        monkeypatch.setattr(peers, "_identity", lambda device: (HOST, "0"))
        monkeypatch.setattr(distributed, "said", both)
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


def noted(size: int = 2) -> list[peers.Calls]:
    memory = bytearray(peers.Calls.memory_bytes(size))
    return [peers.Calls(Group("pair", rank, size), memory) for rank in range(size)]


def test_ranks_that_make_the_same_calls_hear_nothing_of_it():
    """However far one is ahead: of a call that is no longer noted, nothing is said."""
    first, *others = noted(3)
    for ahead in (0, 1, peers.NOTED - 1, peers.NOTED, 3 * peers.NOTED + 1):
        for number in range(ahead):
            first.note("all_gather", torch.float8_e4m3fn, number)
        for each in others:
            for number in range(ahead):
                each.note("all_gather", torch.float8_e4m3fn, number)
                each.compare()


@pytest.mark.parametrize(("ours", "words"), [
    (("all_gather", torch.bfloat16, 96), "all_gather of 96 bfloat16"),
    (("all_reduce", torch.float16, 96), "all_reduce of 96 float16"),
    (("all_reduce", torch.bfloat16, 97), "all_reduce of 97 bfloat16"),
    (("all_reduce", torch.bfloat16, 96, "fp8"), "all_reduce of 96 bfloat16 as fp8"),
    (("all_reduce", torch.bfloat16, 96, "int4"), "all_reduce of 96 bfloat16 as int4"),
    (("a replayed graph", torch.uint8, 8), "a replayed graph of 8 rows")])
def test_ranks_that_call_different_things_are_told_both(ours, words):
    one, other = noted()
    for each in (one, other):
        each.note("reduce_scatter", torch.float32, 1 << 31)
    one.note("all_reduce", torch.bfloat16, 96)
    with pytest.raises(peers.CallsDiffer) as said:
        other.note(*ours)
    assert str(said.value) == (
        f"call 2 in group pair: rank 0 calls all_reduce of 96 bfloat16, rank 1 calls {words}; every rank has to make "
        "the same calls in the same order, on tensors of the same size and dtype, sent alike")
    with pytest.raises(peers.CallsDiffer, match="rank 1 calls .*, rank 0 calls all_reduce of 96 bfloat16"):
        one.compare()


def test_what_two_ranks_note_at_the_same_time_differs_at_the_next_call(monkeypatch):
    one, other = noted()
    with monkeypatch.context() as patch:
        patch.setattr(peers.Calls, "compare", lambda *_: None)
        one.note("all_reduce", torch.float32, 3)
        other.note("all_reduce", torch.float32, 4)
    with pytest.raises(peers.CallsDiffer, match="^call 1 in group pair: rank 1 calls all_reduce of 4 float32, rank 0"):
        one.note("all_reduce", torch.float32, 5)


def test_calls_are_noted_in_a_file_that_is_gone_once_all_have_mapped_it(connected, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(peers, "SHARED_FILES", tmp_path)
    runtime = Runtime()
    assert connected(runtime) is None
    assert not [*tmp_path.iterdir()]
    found = peers.of("pair")
    found.note("all_gather", torch.empty(3))
    peers.note_replay(4)
    assert found.calls._number == 2
    monkeypatch.setattr(peers.mmap, "mmap", lambda *_: 1 / 0)
    with caplog.at_level("INFO", logger="wave64"):
        assert connected(runtime) is None, "kernels need no such file"
    assert peers.of("pair").calls is None
    assert "calls of its ranks are not compared: rank 0: ZeroDivisionError" in caplog.text
    assert not [*tmp_path.iterdir()]
    peers.of("pair").note("all_gather", torch.empty(3))
    peers.check()


def test_the_first_rank_that_cannot_is_named_on_all(monkeypatch):
    monkeypatch.setattr(distributed, "said", lambda mine, group: [None, "out of memory", mine])
    assert peers._agree("any", "mine") == peers._agree("any", None) == "rank 1: out of memory"


@pytest.mark.parametrize("size", range(2, peers.MAX_RANKS + 1))
def test_a_table_says_which_protocol_takes_how_many_bytes(connected, size):
    found = peers.Peers(Group("pair", 0, size), (), (0, 0), 1.0)
    for table, chosen in ((peers.CHOICE, found.protocol), (peers.NORM_CHOICE, found.norm_protocol)):
        rows = table[min(ranks for ranks in table if ranks >= size)]
        assert [limit for limit, _ in rows] == sorted({limit for limit, _ in rows})
        assert rows[-1][0] == found.max_bytes
        for i, (limit, protocol) in enumerate(rows):
            assert chosen(limit) == protocol
            if i + 1 < len(rows):
                assert chosen(limit + 1) == rows[i + 1][1]
    assert [found.protocol(1 << 20, codes) for codes in peers.QUANTIZED] == [4, 5, 6]


def test_torch_takes_what_is_larger_than_the_table_says(connected):
    assert connected(Runtime()) is None
    limit = peers.of("pair").max_bytes
    assert peers.too_large("pair", torch.empty(limit, dtype=torch.uint8, device="meta")) is None
    assert peers.too_large("pair", torch.empty(limit + 1, dtype=torch.uint8, device="meta")) == (
        "torch.distributed exchanges messages of more than 256 MiB")


def test_ranks_that_send_other_codes_are_told_both(connected):
    """A small sum is exact whatever was asked for."""
    assert connected(Runtime()) is None
    mine = peers.of("pair").calls
    theirs = peers.Calls(Group("pair", 1, 2), mine._words.obj)
    small, large = torch.ones(96, dtype=torch.bfloat16), torch.ones(QUANTIZED_FROM // 2, dtype=torch.bfloat16)
    theirs.note("all_reduce", small.dtype, small.numel())
    all_reduce(small, "pair", "int8")
    theirs.note("all_reduce", large.dtype, large.numel())
    with pytest.raises(peers.CallsDiffer, match=f"rank 1 calls all_reduce of {large.numel()} bfloat16, "
                       f"rank 0 calls all_reduce of {large.numel()} bfloat16 as int8; "):
        all_reduce(large, "pair", "int8")
