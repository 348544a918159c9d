"""HIP kernels without a GPU: their sources run on the CPU, lane by lane, under the real launchers, and keep the
contract; and what the launchers record is what a driver needs for the code objects that the build made."""

import functools

import pytest

from wave64 import OPS, platform
from wave64.arch import ARCHS, HIP_TARGETS
from wave64.backends import hip
from wave64.testing import contract, isa, lanes

#: those that a rank launches alone; collectives run side by side: tests/gfx942/test_collectives.py
HIP_OPS = [op for op in OPS.values() if "hip" in op.backends and "group" not in op.signature.parameters]
ON_CPU = ("gfx942", "gfx1201")  # waves of 64 and of 32, FP8 of both flavors


def grid():
    return [pytest.param(op, case, id=f"{op.name}-{case.id}")
            for op in HIP_OPS for case in op.cases() if not case.large]


def drawn(op, case):
    """The case's arguments; skips what the kernel says it does not take."""
    args = contract.draw(case, "cpu", seed=0)
    supports = op.backends["hip"].supports
    if supports is not None and (why := supports(**args)):
        pytest.skip(why)
    return args


@pytest.mark.parametrize("arch", ON_CPU)
@pytest.mark.parametrize(("op", "case"), grid())
def test_kernels_keep_the_contract(op, case, arch):
    def run(**args):
        with lanes.on_cpu(arch):
            return op.backends["hip"].run(**args)

    with platform.target(arch):
        drawn(op, case)
        contract.verify(op, "hip", case, "cpu", run=run)


@functools.cache
def kernels(arch, op):
    """The kernels of the code object that was built, by name."""
    return {kernel.name: kernel for kernel in isa.read_elf(hip.code_object(arch, op))}


@pytest.mark.parametrize("arch", HIP_TARGETS)
@pytest.mark.parametrize(("op", "case"), grid())
def test_recorded_launches_fit_the_code_objects(op, case, arch):
    with platform.target(arch):
        args = drawn(op, case)
    with hip.record(arch) as launches:
        op.backends["hip"].run(**args)
    assert not launches or op.name in {launch.op for launch in launches}
    for launch in launches:
        kernel = kernels(arch, launch.op)[launch.kernel]
        assert launch.code_object.endswith(f"code_objects/{arch}/{launch.op}.co")
        assert len(launch.args) == kernel.argument_bytes
        assert all(0 < n < 2**31 for n in (*launch.grid, *launch.block))
        lanes_of_block = launch.block[0] * launch.block[1] * launch.block[2]
        assert lanes_of_block <= kernel.max_block
        assert lanes_of_block % ARCHS[arch].wave_size == 0
        assert launch.lds_bytes + kernel.lds_bytes <= ARCHS[arch].lds_bytes
        assert set(hip.arguments(launch)) == {name for name, _, _ in hip._hip.fields()[launch.op]}
