"""What a run of the tests executed on the emulator, of what there is: told at its end."""

from collections.abc import Iterator
from typing import Any

import launched


def lines(told: list[tuple[str, Any]]) -> Iterator[str]:
    """A line per architecture, of what tests that passed recorded: ("emulated", what a test executed) and ("planned",
    the binaries of large cases, by the test that looks for what is left out; without it their number is not known)."""
    for arch in launched.ARCHS:
        ran = [value for name, value in told if name == "emulated" and value["arch"] == arch]
        if not ran:
            continue
        kernels = {kernel for value in ran for _, kernel in value.get("kernels", ())}  # (operator or object, kernel)
        binaries = {key for value in ran for key in value.get("binaries", ())}
        rows = {tuple(row) for value in ran for row in value.get("rows", ())}
        of_large = {key for name, value in told if name == "planned" and value["arch"] == arch
                    for key in value["binaries"]}
        tables = sum(len(table.rows) for table in launched.tables(arch).values())
        there = {kernel for _, kernel in launched.hip_symbols(arch)}
        words = [f"{len(kernels & there)} of {len(there)} HIP kernels",
                 f"{len(rows)} of {tables} tuned rows", f"{len(binaries)} Triton binaries"]
        if of_large:
            words[-1] += f", among them {len(of_large & binaries)} of the {len(of_large)} of large cases"
        words.append(f"{sum(value['instructions'] for value in ran):,} wave instructions")
        if kept := sum(not value.get("anew", True) for value in ran):
            anew = sum(value["instructions"] for value in ran if value.get("anew", True))
            words.append(f"of these {len(ran) - kept} cases anew, with {anew:,} instructions, and {kept} as "
                         "recorded.json has them")
        yield f"emulated {arch}: {', '.join(words)}"
