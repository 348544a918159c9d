"""Goes through a kernel's machine code an instruction at a time: what one wave executes, and what it wrote.

    python -m wave64.testing.emulator.step gfx942 rms_norm --case 5x97
    python -m wave64.testing.emulator.step gfx942 rms_norm --wave 1 --lane 5 --begin 0x120 --count 20
    python -m wave64.testing.emulator.step gfx942 mla_decode --backend triton --pause

A line is the instruction's offset (and source line, where the code object has it), its text, and behind it the
registers it wrote: scalar ones, and of vector ones what the lane has, as bits and as fp32. Without --case it is the
operator's first. --pause waits for Enter after each line; q ends.
"""

import argparse
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

from wave64 import OPS, platform
from wave64.testing import contract
from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.check import BACKENDS, small_case
from wave64.testing.emulator.decode import SCC
from wave64.testing.emulator.watch import SCALAR, Check, name_of, registers


class Stop(Exception):
    """As many lines as were asked for."""


@dataclass(frozen=True)
class View:
    """Whom to watch, from which offset of the kernel on, for how many instructions; `show` takes the lines."""

    workgroup: int = 0
    wave: int = 0   # of the workgroup
    lane: int = 0
    kernel: str = ""  # part of its name; empty: any
    begin: int = 0
    count: int = 40
    show: Callable[[str], None] = print


def stepping(view: View) -> type[Check]:
    """A check, as emulate() and emulate_triton() take them, that shows what the wave executes and raises Stop."""
    left = view.count

    class Stepping(Check):
        def __init__(self, machine):
            super().__init__(machine)
            self.batch = -1

        def start(self) -> None:
            self.batch += 1

        def wrap(self, b: Binding, execute: Callable) -> Callable:
            machine, waves = self.machine, set(b.party.numbers.tolist())
            written = registers(b.writes)
            offset = b.pc * 4 + machine.program.code.text[0] - machine.kernel.entry

            def shown():
                nonlocal left
                outcome = execute()
                first = self.batch * machine.shape.groups
                number = (view.workgroup - first) * machine.shape.waves + view.wave
                if number not in waves or offset < view.begin or view.kernel not in machine.kernel.name:
                    return outcome
                values = ", ".join(f"{name_of(r)} = {self.value(r, number)}" for r in written)
                view.show(f"{machine.where(b.pc)}" + (f"    {values}" if values else ""))
                left -= 1
                if left == 0:
                    raise Stop
                return outcome
            return shown

        def value(self, register: int, number: int) -> str:
            if register == SCALAR + SCC:
                return str(int(self.machine.scc[number]))
            if register >= SCALAR:
                return f"0x{int(self.machine.sgprs[number, register - SCALAR]):08x}"
            bits = int(self.machine.vgprs[register, number, view.lane])
            return f"0x{bits:08x} ({struct.unpack('<f', struct.pack('<I', bits))[0]:.6g})"

    return Stepping


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64.testing.emulator.step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=("gfx942", "gfx950"))
    parser.add_argument("op", choices=OPS, metavar="OP")
    parser.add_argument("--backend", choices=BACKENDS, help="default: hip where the operator has it")
    parser.add_argument("--case", default="", help="the first case with this in its name")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--workgroup", type=int, default=0)
    parser.add_argument("--wave", type=int, default=0, help="of the workgroup")
    parser.add_argument("--lane", type=int, default=0)
    parser.add_argument("--begin", type=lambda text: int(text, 0), default=0, metavar="OFFSET",
                        help="show nothing before this offset of the kernel")
    parser.add_argument("--count", type=int, default=40, help="instructions to show")
    parser.add_argument("--pause", action="store_true", help="wait for Enter after each")
    args = parser.parse_args()
    backend, case = small_case(parser, args.op, args.case, args.backend)

    def show(line: str) -> None:
        print(line, flush=True)
        if args.pause and sys.stdin.readline().strip() == "q":
            raise Stop

    view = View(args.workgroup, args.wave, args.lane, args.kernel, args.begin, args.count, show)
    with platform.target(args.arch):
        try:
            with BACKENDS[backend](args.arch, (stepping(view),)):
                OPS[args.op].backends[backend].run(**contract.draw(case, "cpu", seed=0))
        except Stop:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
