"""Which configuration a kernel is launched with: read from `tuned/<arch>/<op>.json`, in the form that the tuner writes.

A table, one row a line:
    op, arch  whose it is
    sources   what choices were made from, and by whom: timings, executed machine code or static figures by the tuner,
              with its command and what was compared where a row was chosen by hand; device and compiler versions
    rows      when: facts of a call, each an exact value or, of integers, an inclusive range [low, high], null: open;
              config: fields of the launcher's `Config`; source: index into sources; of rows that the tuner chose,
              measured: its figures; why: words, where there are any
The first row whose `when` fits the facts is chosen; the last has an empty one. An architecture without a table uses one
of its kin's, `kin` says whose. `python -m wave64.testing.tune` writes tables.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from wave64 import platform
from wave64.arch import Arch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # what type checkers call one

FOLDER = Path(__file__).with_name("tuned")
#: The "architecture" of Triton's interpreter.
INTERPRETER = "interpreter"

Fact = bool | int | str
T = TypeVar("T", bound="DataclassInstance")


class TunedTableError(ValueError):
    """A table that is not there, says what it cannot mean or has no row for a call; the message names file and fact."""


@dataclasses.dataclass(frozen=True)
class Row:
    when: Mapping[str, Any]
    config: Mapping[str, Any]
    source: int
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    why: str = ""

    def fits(self, facts: Mapping[str, Fact], file: Path) -> bool:
        for name, wanted in self.when.items():
            if name not in facts:
                raise TunedTableError(f"{file}: {name}: expected one of the facts {', '.join(facts)}")
            value = facts[name]
            if not isinstance(wanted, list):
                if value != wanted:
                    return False
            elif wanted[0] is not None and value < wanted[0] or wanted[1] is not None and value > wanted[1]:
                return False
        return True


@dataclasses.dataclass(frozen=True)
class Table:
    file: Path
    op: str
    arch: str
    sources: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...]


def kin(arch: Arch | None) -> tuple[str, ...]:
    """Whose tables serve an architecture (None: the interpreter), its own first."""
    if arch is None:
        return (INTERPRETER,)
    if arch.vendor == "nvidia":
        return (arch.name, "sm_80")  # with little on-chip memory, as any may have
    return (arch.name, "gfx942" if arch.matrix == "mfma" else "gfx1100")


@functools.cache
def read(file: Path) -> Table:
    """The table in `file`, of the form that is described above."""
    try:
        content = json.loads(file.read_text())
        rows = tuple(Row(**row) for row in content.pop("rows"))
        table = Table(file, sources=tuple(content.pop("sources")), rows=rows, **content)
    except (ValueError, TypeError, KeyError) as e:
        raise TunedTableError(f"{file}: expected a table of launch configurations: {type(e).__name__}: {e}") from e
    for number, row in enumerate(rows, 1):
        for name, wanted in row.when.items():
            if isinstance(wanted, list) and (len(wanted) != 2 or any(type(x) not in (int, type(None)) for x in wanted)):
                raise TunedTableError(f"{file}: row {number}: {name}: expected [low, high], got {wanted}")
        if not 0 <= row.source < len(table.sources):
            raise TunedTableError(f"{file}: row {number}: source: expected an index into {len(table.sources)} sources, "
                                  f"got {row.source}")
    if not rows or rows[-1].when:
        raise TunedTableError(f"{file}: expected a last row that fits every call, with an empty `when`")
    return table


def table(op: str, arch: Arch | None, folder: Path | None = None) -> Table:
    """The table that serves `op` on `arch`: its own, or the first that one of its kin has."""
    files = [(folder or FOLDER) / name / f"{op}.json" for name in kin(arch)]
    for file in files:
        if file.exists():
            return read(file)
    raise TunedTableError(f"{op}: no launch configuration: expected one of the files {', '.join(map(str, files))}")


def build(config: type[T], row: Row, file: Path) -> T:
    """The row's configuration; its dicts can be read, not changed, for one object serves every launch."""
    known = [field.name for field in dataclasses.fields(config)]
    if unknown := [name for name in row.config if name not in known]:
        raise TunedTableError(f"{file}: config: {', '.join(unknown)}: expected fields among {', '.join(known)}")
    try:
        made = config(**row.config)
    except TypeError as e:  # one that has no default is missing
        raise TunedTableError(f"{file}: config {dict(row.config)}: {e}") from e
    for name in known:
        if isinstance(value := getattr(made, name), dict):
            object.__setattr__(made, name, MappingProxyType(dict(value)))
    return made


def choose(op: str, config: type[T], **facts: Fact) -> T:
    """The configuration for a call of these facts on the architecture that kernels are launched for."""
    if _forced and op in _forced:
        return _forced[op]
    arch = platform.arch()
    key = (op, config, arch and arch.name, *facts.items())  # cheaper than a call that functools caches by its keywords
    return _chosen.get(key) or _choose(key, op, config, arch, facts)


def _choose(key: tuple, op: str, config: type[T], arch: Arch | None, facts: dict[str, Fact]) -> T:
    found = table(op, arch)
    row = next(row for row in found.rows if row.fits(facts, found.file))
    if len(_chosen) >= 10_000:  # lengths of prompts are among the facts
        _chosen.clear()
    _chosen[key] = made = build(config, row, found.file)
    return made


_chosen: dict[tuple, Any] = {}
_forced: dict[str, Any] = {}


@contextlib.contextmanager
def forced(op: str, config: Any) -> Iterator[None]:
    """Launches of `op` inside the block take `config` instead of the table's, for the tuner and for tests."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]
