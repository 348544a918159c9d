"""From an instruction to what binds it to a party of waves: a form, by mnemonic."""

from collections.abc import Callable

from wave64.testing.emulator import lds, matrix, modes, packed, scalar, vector, vmem
from wave64.testing.emulator.decode import Instruction

FORMS: dict[str, Callable] = scalar.FORMS | modes.FORMS | vmem.FORMS | lds.FORMS | vector.FORMS | packed.FORMS


def lookup(instruction: Instruction) -> Callable:
    """Raises NotImplementedError where the emulator does not know the instruction."""
    form = FORMS.get(instruction.name) or matrix.form(instruction.name)
    if form is None:
        raise NotImplementedError(f"the emulator does not know {instruction.name}")
    return form
