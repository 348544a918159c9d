"""Pools larger than 2 GiB: every operator that touches a cache has cases with them, whose pages in use lie on both
sides of every border, and nothing touches more memory than those pages."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
import triton

from wave64 import OPS, pools
from wave64.op import Case
from wave64.op import op as declare
from wave64.testing import contract, sparse

POOLS = ("key_cache", "value_cache", "kv_cache", "src", "dst")
CACHE_OPS = [op for op in OPS.values() if any(name in POOLS for name in inspect.signature(op.reference).parameters)]
#: What a process may use at most, in KiB: the interpreter, torch and Triton are about half of it.
MAX_BYTES = 2**20


def sparse_cases(op):
    return [case for case in op.cases() if case.sparse]


@pytest.mark.parametrize("op", CACHE_OPS, ids=lambda op: op.name)
def test_every_operator_on_a_cache_has_pools_beyond_2_gib(op):
    seen = set()
    for case in sparse_cases(op):
        args = contract.draw(case, "cpu", 0)
        assert set(case.sparse) == {name for name in POOLS if name in args}
        for name in case.sparse:
            pool, used = args[name], pools.rows_in_use(args[name])
            assert pool.is_contiguous()
            assert pool.nbytes > 3 * 2**30
            assert len(set(used)) == len(used)
            for row in (0, pool.shape[0] - 1):
                assert row in used
            crossing = [size for size in (2**31, 2**32) if size < pool.nbytes]
            assert all(any(row * pool[0].nbytes <= size < (row + 1) * pool[0].nbytes for row in used)
                       for size in crossing)
            if pool.itemsize == 1:
                assert pool.numel() > 2**32
            seen.add((pool.itemsize, pool.shape[1]))
    assert len(seen) == 4, "bf16 and FP8, pages of 16 and of 64"


def rows_read(args):
    if "page_table" in args:
        page_size = args.get("key_cache", args.get("kv_cache")).shape[1]
        for row, length in zip(args["page_table"].tolist(), args["seq_lens"].tolist(), strict=True):
            yield from row[:-(-length // page_size)]
    for name in ("slot_mapping", "src_slots", "dst_slots"):
        if name in args:
            pool = args[{"slot_mapping": "kv_cache", "src_slots": "src", "dst_slots": "dst"}[name]
                        if "key_cache" not in args else "key_cache"]
            page_size = pool.shape[1] if name == "slot_mapping" else 1
            yield from (slot // page_size for slot in args[name].flatten().tolist() if 0 <= slot < 2**39)


@pytest.mark.parametrize("op", CACHE_OPS, ids=lambda op: op.name)
def test_pages_on_both_sides_of_every_border_take_part(op):
    for case in sparse_cases(op):
        args = contract.draw(case, "cpu", 0)
        pool = args[case.sparse[0]]
        read = set(rows_read(args))
        assert read <= set(pools.rows_in_use(pool))
        sides = {row * pool[0].nbytes // 2**31 for row in read}
        assert {0, 1} <= sides
        assert pool.itemsize > 1 or 2 in sides


MEASURE = """
from wave64 import OPS, platform
from wave64.testing import contract
from wave64.testing.emulator.check import check
for op in map(OPS.get, {ops}):
    case = next(case for case in op.cases() if case.sparse)
    if {arch!r}:
        result = check(op, {backend!r}, {arch!r}, [case])
        assert result.passed == 1, result.line()
    else:
        contract.verify(op, {backend!r}, case, "cpu")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(("backend", "arch", "ops"), [
    ("reference", None, [op.name for op in CACHE_OPS]),
    ("triton", None, ["reshape_and_cache", "paged_attention"]),
    ("triton", "gfx942", ["reshape_and_cache", "paged_attention"]),
    ("hip", "gfx942", ["reshape_and_cache", "paged_attention"]),
])
def test_they_need_less_than_1_gib(backend, arch, ops):
    if backend == "triton" and arch is None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("Triton's interpreter cannot run paged_attention before 3.9")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if arch else {"TRITON_INTERPRET": "1"})
    code = MEASURE.format(backend=backend, arch=arch, ops=ops)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MAX_BYTES


def bad(name):
    def right(pool, numbers):
        pool[numbers] += 1

    def reads_beyond(pool, numbers):
        pool[numbers] += 1 + 0 * pool[5000, 0]

    def writes_beyond(pool, numbers):
        pool[numbers] += 1
        pool[-5000] = 1

    def writes_a_neighbor(pool, numbers):
        pool[numbers] += 1
        pool[numbers.max() + 1] = 1

    def leaves_the_last(pool, numbers):
        pool[numbers[:-1]] += 1

    return locals()[name]


@pytest.mark.parametrize(("name", "message"), [
    ("right", None), ("reads_beyond", "argument pool was touched outside its rows in use, about byte 7606272"),
    ("writes_beyond", "argument pool was touched outside"), ("writes_a_neighbor", "result 0: error inf against fp64"),
    ("leaves_the_last", "result 0: error")])
def test_the_contract_finds_what_a_sparse_pool_hides(name, message):
    def test_sparse(pool: torch.Tensor, numbers: torch.Tensor) -> None:
        pool[numbers] += 1

    op = declare(cases=list, cost=lambda pool, numbers: None, mutates=("pool",), fake=lambda *_: None)(test_sparse)
    del OPS["test_sparse"]
    op.backend("triton")(bad(name))
    case = Case("some", lambda: pools.spread(
        dict(pool=torch.randn(8, 761, dtype=torch.bfloat16), numbers=torch.arange(8)), ("pool",), 3 * pools.GIB,
        slots=("numbers",)), sparse=("pool",))
    if message is None:
        contract.verify(op, "triton", case, "cpu")
    else:
        with pytest.raises(contract.ContractError, match=message):
            contract.verify(op, "triton", case, "cpu")


@pytest.mark.parametrize(("row", "message"), [(2, None), (5000, "argument src was touched outside its rows in use")])
def test_pools_in_one_storage_are_both_in_use_and_nothing_else_is(row, message):
    def test_halves(src: torch.Tensor, dst: torch.Tensor) -> None:
        dst[2] = src[2]

    def drawn():
        halves = torch.empty(2, 600000, 4, 512, dtype=torch.bfloat16)
        for half in halves:
            half[pools.rows_in_use(half)] = 1.5
        return dict(src=halves[0], dst=halves[1])

    def reads(src, dst):
        dst[2] = src[2] + 0 * src[row]

    op = declare(cases=list, cost=lambda src, dst: None, mutates=("dst",), fake=lambda *_: None)(test_halves)
    del OPS["test_halves"]
    op.backend("triton")(reads)
    case = Case("some", drawn, sparse=("src", "dst"))
    if message is None:
        contract.verify(op, "triton", case, "cpu")
    else:
        with pytest.raises(contract.ContractError, match=message):
            contract.verify(op, "triton", case, "cpu")


def test_what_is_copied_and_widened_is_what_is_in_use():
    drawn = pools.spread(dict(pool=torch.randn(24, 16, 64)), ("pool",), 3 * pools.GIB)
    pool, rows = drawn["pool"], pools.rows_in_use(drawn["pool"])
    twin = contract.copy(drawn, ("pool",))["pool"]
    wide = contract.widen(pool, is_sparse=True)
    assert wide.dtype == torch.float64
    for other in (twin, wide):
        assert other.shape == pool.shape
        assert torch.equal(sparse.held(other, rows).double(), sparse.held(pool, rows).double())
    assert sparse.touched(twin.view(-1).view(torch.uint8), sparse.spans(twin)) is None
    assert sparse.touched(twin.view(-1).view(torch.uint8), sparse.spans(twin)[1:]) == 0
