"""Which line of source an instruction came from, as a code object's debug information has it: DWARF's line table.

Triton writes one. Code objects of HIP sources have it where they were compiled with -gline-tables-only; those that ship
were not, so that a report has them compiled again (see run.py). Read with pyelftools, of the extra `test`: without it
no line is known.
"""

import bisect
import importlib.util
import io

Row = tuple[int, str]  # address, "file:line" or "" where nothing is known from there on


def read(code: bytes) -> list[Row]:
    """The rows of all line tables, by address."""
    if importlib.util.find_spec("elftools") is None:
        return []
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(code))
    if not elf.has_dwarf_info():
        return []
    dwarf, rows = elf.get_dwarf_info(), []
    for unit in dwarf.iter_CUs():
        program = dwarf.line_program_for_CU(unit)
        if program is None:
            continue
        names = [entry.name.decode() for entry in program["file_entry"]]
        first = 1 if program["version"] < 5 else 0
        for state in (entry.state for entry in program.get_entries() if entry.state is not None):
            known = state.line and not state.end_sequence
            rows.append((state.address, f"{names[state.file - first]}:{state.line}" if known else ""))
    return sorted(rows, key=lambda row: row[0])  # of rows with one address the last one holds


def line_at(rows: list[Row], address: int) -> str:
    """"file:line" of the instruction at `address`, "" where nothing is known."""
    after = bisect.bisect_right(rows, address, key=lambda row: row[0])
    return rows[after - 1][1] if after else ""
