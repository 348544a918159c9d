"""What is asked of MSCCL++, by a stand-in for its package that has the published signatures and notes each call."""

import ctypes
import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from wave64 import distributed
from wave64.backends import peers
from wave64.distributed import Group, mscclpp
from wave64.serve.args import ServerArgs
from wave64.serve.engine import ranks

SIZE = 4  # ranks, of which this process is one, and all have the same


class Algorithm:
    def __init__(self, package, name, collective, smallest, largest):
        self.package, self.name, self.collective = package, name, collective
        self.message_size_range = (smallest, largest)

    def execute(self, comm, input_buffer, output_buffer, input_size, output_size, dtype, op=None, stream=0,
                executor=None, nblocks=0, nthreads_per_block=0, symmetric_memory=False, extras=None) -> int:
        assert (comm, op, executor) == ("communicator", "sum", None)
        assert input_buffer == output_buffer
        assert input_size == output_size
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        torch.frombuffer((ctypes.c_char * input_size).from_address(input_buffer), dtype=kind).mul_(SIZE)
        self.package.calls.append((self.name, input_size, dtype))
        return self.package.status


@pytest.fixture
def package(monkeypatch):
    made: Any = types.ModuleType("mscclpp")
    made.calls, made.status, made.groups = [], 0, []
    made.algorithms = [
        Algorithm(made, "default_allgather_fullmesh", "allgather", 0, 1 << 40),
        Algorithm(made, "default_allreduce_nvls_packet", "allreduce", 0, 512 << 10),
        Algorithm(made, "default_allreduce_rsag_zero_copy", "allreduce", 512 << 10, 4 << 30),
        Algorithm(made, "default_allreduce_packet", "allreduce", 0, 2 << 20)]

    class CommGroup:
        def __init__(self, mpi_comm=None, torch_group=None, interfaceIpPortTrio="", rank=None, size=None):
            made.groups.append(torch_group)
            self.communicator, self.my_rank = "communicator", 0

    class RawGpuBuffer:
        def __init__(self, size):
            self.size = size

        def to_dlpack(self, data_type):
            assert data_type == "torch.float16"
            made.scratch = torch.empty(self.size // 2, dtype=torch.float16)
            return made.scratch.__dlpack__()

    class AlgorithmCollectionBuilder:
        def build_default_algorithms(self, scratch_buffer, scratch_buffer_size, rank):
            assert (scratch_buffer, scratch_buffer_size, rank) == (made.scratch.data_ptr(), 128 << 20, 0)
            return made.algorithms

    made.CommGroup, made.RawGpuBuffer = CommGroup, RawGpuBuffer
    made.AlgorithmCollectionBuilder = AlgorithmCollectionBuilder
    made.ReduceOp = types.SimpleNamespace(SUM="sum")
    utils: Any = types.ModuleType("mscclpp.utils")
    utils.torch_dtype_to_mscclpp_dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get
    monkeypatch.setitem(sys.modules, "mscclpp", made)
    monkeypatch.setitem(sys.modules, "mscclpp.utils", utils)
    monkeypatch.setattr(mscclpp, "find_spec", lambda name: name)
    return made


@pytest.fixture
def world(monkeypatch):
    """A group whose other ranks say what this one does, and whose torch.distributed sums."""
    group, by_torch = distributed.register(Group("world", 0, SIZE), "torch's"), []

    def sums(x, group):
        assert group == "torch's"
        by_torch.append(x.nbytes)
        x.mul_(SIZE)

    monkeypatch.setattr(dist, "all_reduce", sums)
    monkeypatch.setattr(dist, "new_group", lambda backend: f"{backend}'s")
    monkeypatch.setattr(mscclpp, "said", lambda mine, name: [mine] * SIZE)
    yield group, by_torch
    distributed.leave()
    peers._KNOWN.clear()


def test_messages_that_it_is_for_are_summed_by_it_and_the_others_by_torch(package, world):
    group, by_torch = world
    assert mscclpp.connect(group) is None
    assert package.groups == ["gloo's"]
    packet, zero_copy = "default_allreduce_packet", "default_allreduce_rsag_zero_copy"
    for count, dtype, wanted in [
            (128, torch.float32, packet), (127, torch.float32, None), (129, torch.float32, None),
            (1 << 20, torch.bfloat16, packet), ((1 << 20) + 8, torch.float16, zero_copy),
            (4 << 20, torch.bfloat16, zero_copy), ((4 << 20) + 8, torch.bfloat16, None), (512, torch.float64, None)]:
        package.calls.clear(), by_torch.clear()
        x = torch.ones(count, dtype=dtype)
        assert torch.equal(distributed.all_reduce(x, group.name), torch.full_like(x, SIZE))
        assert x[0] == 1, "the argument does not change"
        assert [call[:2] for call in package.calls] == ([(wanted, x.nbytes)] if wanted else [])
        assert by_torch == ([] if wanted else [x.nbytes])
    package.status = 3
    with pytest.raises(RuntimeError, match="all_reduce of 512 bytes by default_allreduce_packet: status 3"):
        distributed.all_reduce(torch.ones(128), group.name)


def test_the_flag_lets_it_serve_and_kernels_say_so(package, world, caplog):
    group, _ = world
    args = ServerArgs("m", tp_size=SIZE, enable_mscclpp=True)
    ranks._connect(args, group, torch.device("cpu"))
    assert peers.reason("world") == "--enable-mscclpp: MSCCL++ sums messages of 512 bytes to 8 MiB"
    distributed.all_reduce(torch.ones(128), group.name)
    assert package.calls
    assert not caplog.messages


@pytest.mark.parametrize(("change", "words"), [
    (lambda package, patch: patch.setattr(mscclpp, "find_spec", lambda name: None),
     "rank 0: the package mscclpp is missing"),
    (lambda package, patch: patch.delattr(package, "CommGroup"),
     "rank 0: the package mscclpp is another than this is written for: AttributeError: module 'mscclpp' has no "
     "attribute 'CommGroup'"),
    (lambda package, patch: package.algorithms.__delitem__(slice(2, None)),
     "rank 0: the package mscclpp is another than this is written for: RuntimeError: expected one of "
     "default_allreduce_packet, default_allreduce_rsag_zero_copy among its algorithms, got "
     "default_allreduce_nvls_packet"),
    (lambda package, patch: patch.setattr(mscclpp, "said", lambda mine, name: [None, "it is gone"]),
     "rank 1: it is gone"),
    (lambda package, patch: patch.setattr(mscclpp, "SIZES", (8,)), "expected 8 ranks, got 4")])
def test_why_it_takes_no_part_is_said_and_the_group_goes_on_without(package, world, monkeypatch, caplog, change, words):
    group, by_torch = world
    change(package, monkeypatch)
    args = ServerArgs("m", tp_size=SIZE, enable_mscclpp=True, disable_custom_all_reduce=True)
    with caplog.at_level("WARNING", logger="wave64"):
        ranks._connect(args, group, torch.device("cpu"))
    assert caplog.messages[0] == f"group world: --enable-mscclpp: MSCCL++ takes no part: {words}"
    distributed.all_reduce(torch.ones(128), group.name)
    assert by_torch == [512]
    assert not package.calls


def test_groups_of_attention_are_left_to_torch(package, world):
    assert mscclpp.connect(Group("data", 0, SIZE)) == "groups of data-parallel attention are torch.distributed's"
