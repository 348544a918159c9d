"""A CDNA emulator: executes the machine code of our operators, gfx942's and gfx950's, on a CPU."""

from wave64.testing.emulator.memory import EmulationError
from wave64.testing.emulator.run import Counts, emulate, execute

__all__ = ["Counts", "EmulationError", "emulate", "execute"]
