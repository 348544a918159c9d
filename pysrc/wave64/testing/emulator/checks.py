"""What hardware does not check, and a kernel must not do: each class watches a machine and raises EmulationError."""

from wave64.testing.emulator.hazards import Hazards
from wave64.testing.emulator.races import OneValue, SharedMemory
from wave64.testing.emulator.unwritten import Unwritten
from wave64.testing.emulator.waits import Waits
from wave64.testing.emulator.watch import Check

#: all of them, which is what `emulate` uses
ALL = (Waits, SharedMemory, OneValue, Unwritten, Hazards)

__all__ = ["ALL", "Check", "Hazards", "OneValue", "SharedMemory", "Unwritten", "Waits"]
