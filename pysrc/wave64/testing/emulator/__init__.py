"""A CDNA emulator: executes the machine code of our operators, gfx942's and gfx950's, on a CPU."""

from wave64.testing.emulator.memory import Buffer, EmulationError
from wave64.testing.emulator.run import Counts, emulate, execute
from wave64.testing.emulator.together import Deadlock, execute_together
from wave64.testing.emulator.views import DeviceBuffer

__all__ = ["Buffer", "Counts", "Deadlock", "EmulationError", "DeviceBuffer", "emulate", "execute", "execute_together"]
