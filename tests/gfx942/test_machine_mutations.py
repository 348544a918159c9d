"""Deliberate bugs in the machine code that ships, and in how it is launched: every one is caught, by the contract or by
what the emulator checks beside it."""

from types import SimpleNamespace

import pytest

from wave64 import OPS, platform
from wave64.backends import hip
from wave64.testing import contract
from wave64.testing.emulator import code_object, emulate, run
from wave64.testing.emulator.machine import Program

ARCH = "gfx942"
NOP = (0xBF800000).to_bytes(4, "little")
OPERATORS = ("rms_norm", "silu_and_mul", "topk_softmax", "moe_align_block_size", "paged_attention")
#: which of the waits that a case executes is dropped, as a fraction of their number
WHICH = (0.0, 0.5)


def cases(op):
    with platform.target(ARCH):
        backend = op.backends["hip"]
        return [case for case in op.cases() if not case.large and (
            backend.supports is None or backend.supports(**contract.draw(case, "cpu", 0)) is None)]


def caught(op, some) -> str | None:
    """The first complaint that running the cases brings."""
    def call(**args):
        with emulate(ARCH):
            return op.backends["hip"].run(**args)

    with platform.target(ARCH):
        for case in some:
            try:
                contract.verify(op, "hip", case, "cpu", run=call)
            except (AssertionError, RuntimeError) as e:
                return f"{type(e).__name__}: {e}"
    return None


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_dropped_wait_is_caught(name, which, monkeypatch):
    op = OPS[name]
    first = cases(op)[:1]
    program = Program(code_object.CodeObject(hip.code_object(ARCH, name)))
    monkeypatch.setattr(run, "_program", lambda code: program)
    assert caught(op, first) is None
    waits = [place for place, instruction in enumerate(program.instructions)
             if instruction is not None and instruction.name == "s_waitcnt"]
    place = waits[int(which * len(waits))]
    wrong = Program(code_object.CodeObject(hip.code_object(ARCH, name)))
    wrong.text[4 * place:4 * place + 4] = list(NOP)
    monkeypatch.setattr(run, "_program", lambda code: wrong)
    assert "s_waitcnt" in (caught(op, first) or "")


#: what is wrong with a launch -> (operator, what becomes of it)
LAUNCHES = {
    "a workgroup too few": ("rms_norm", lambda launch: {"grid": (launch.grid[0] - 1, *launch.grid[1:])}),
    "arguments in another order": ("silu_and_mul", lambda launch: {"args": launch.args[8:16] + launch.args[:8]
                                                                   + launch.args[16:]}),
}
FIELDS = ("kernel", "code_object", "grid", "block", "lds_bytes", "args")


@pytest.mark.parametrize("bug", LAUNCHES)
def test_a_wrong_launch_is_caught(bug, monkeypatch):
    name, change = LAUNCHES[bug]
    right = run.execute

    def wrong(launch, *rest):
        fields = {field: getattr(launch, field) for field in FIELDS} | change(launch)
        return right(SimpleNamespace(**fields), *rest) if fields["grid"][0] else None

    monkeypatch.setattr(run, "execute", wrong)
    assert caught(OPS[name], cases(OPS[name]))
