"""What the emulator's tests launch of what the package ships, found by recording launches, without executing them."""

from wave64 import OPS, platform
from wave64.backends import hip
from wave64.op import Case, Op
from wave64.testing import contract
from wave64.testing.emulator import code_object

ARCHS = ("gfx942", "gfx950")


def small_cases(backend: str) -> list[tuple[Op, Case]]:
    """Those that the emulator's tests hold to the contract: of every operator that has the backend."""
    return [(op, case) for op in OPS.values() if backend in op.backends for case in op.cases() if not case.large]


def hip_symbols(arch: str) -> set[tuple[str, str]]:
    """(operator, kernel) of every kernel in the code objects that the package has for `arch`."""
    return {(op, kernel) for op in hip.code_objects().get(arch, ())
            for kernel in code_object.load(hip.code_object(arch, op)).kernels}


def hip_launched(arch: str, cases: list[tuple[Op, Case]]) -> set[tuple[str, str]]:
    """(operator, kernel) of every kernel that the cases launch, as far as the backend does not decline them."""
    found = set()
    for op, case in cases:
        own = op.backends["hip"]
        with platform.target(arch):
            args = contract.draw(case, "cpu", seed=0)
            if own.supports is None or own.supports(**args) is None:
                with hip.record(arch) as launches:
                    own.run(**args)
                found |= {(op.name, launch.kernel) for launch in launches}
    return found
