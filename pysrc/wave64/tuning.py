"""Which configuration a kernel is launched with: read from a tuned table, in the form that the tuner writes.

A backend that has a choice registers a `Tuning`: `@op.backend("triton", tuning=Tuning(...))`. Its table is
`tuned/<arch>/<op>.json`, of another backend than triton `tuned/<arch>/<backend>/<op>.json`, one row a line:
    op, arch  whose it is; backend, unless it is triton
    sources   what choices were made from: timings, predicted times or static figures by the tuner, with its
              command; or, with chosen_by "person", what was compared by hand; device and compiler versions
    rows      when: names in the tuning key, each an exact value or, of integers, an inclusive range [low, high], null:
              open; config: fields of the launcher's `Config`; source: index into sources; of rows that the tuner chose,
              measured: its figures; why: a few words, where the row needs them
The first row whose `when` fits the tuning key is chosen; the last has an empty one. An architecture without a table
uses the one of its fallback arch, see `fallback_archs`. `python -m wave64.testing.tune` writes tables.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from wave64 import platform
from wave64.arch import Arch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # what type checkers call one

FOLDER = Path(__file__).with_name("tuned")
#: The "architecture" of Triton's interpreter.
INTERPRETER = "interpreter"

Value = bool | int | str
Key = Mapping[str, Value]
T = TypeVar("T", bound="DataclassInstance")


class TunedTableError(ValueError):
    """A table is missing, cannot be read or has no row for a call; the message names the file and the key."""


@dataclasses.dataclass(frozen=True)
class Row:
    when: Mapping[str, Any]
    config: Mapping[str, Any]
    source: int
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    why: str = ""

    def fits(self, key: Key, file: Path) -> bool:
        for name, wanted in self.when.items():
            if name not in key:
                raise TunedTableError(f"{file}: {name}: expected a name in the tuning key: {', '.join(key)}")
            value = key[name]
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
    backend: str = "triton"


def fallback_archs(arch: Arch | None) -> tuple[str, ...]:
    """Architectures whose tables serve `arch` (None: the interpreter), its own first."""
    if arch is None:
        return (INTERPRETER,)
    if arch.vendor == "nvidia":
        return (arch.name, "sm_80")  # its tables want little on-chip memory
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
        by_hand = table.sources[row.source].get("chosen_by") == "person"
        if by_hand == bool(row.measured):
            raise TunedTableError(f"{file}: row {number}: expected either `measured` or a source with "
                                  f"\"chosen_by\": \"person\", got {'both' if by_hand else 'neither'}")
    if not rows or rows[-1].when:
        raise TunedTableError(f"{file}: expected a last row that fits every call, with an empty `when`")
    return table


def table_file(op: str, backend: str, arch: str, folder: Path | None = None) -> Path:
    inside = (folder or FOLDER) / arch
    return (inside if backend == "triton" else inside / backend) / f"{op}.json"


def table(op: str, arch: Arch | None, backend: str = "triton") -> Table:
    """The table that serves `op` on `arch`: its own, or the first that one of its fallback archs has."""
    files = [table_file(op, backend, name) for name in fallback_archs(arch)]
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
    except TypeError as e:  # a field without a default is missing
        raise TunedTableError(f"{file}: config {dict(row.config)}: {e}") from e
    for name in known:
        if isinstance(value := getattr(made, name), dict):
            object.__setattr__(made, name, MappingProxyType(dict(value)))
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning(Generic[T]):
    """How the launch configuration of a backend is chosen, and what the tuner needs to choose it anew.

    op          the operator whose table is read: usually the backend's own, but two operators that launch the same
                kernel share one table by sharing its name here
    config      frozen dataclass, how the kernels are launched
    key         (**arguments of a call) -> tuning key: what a choice may depend on and the host knows without asking the
                device
    buckets     name in the key -> upper bounds of the ranges in which an integer counts as the same; other values count
                exactly
    candidates  (arch, **key) -> configurations that the tuner tries
    work        (config, **key) -> what a block computes per step of its loop, to compare instruction counts
    backend     whose table it is
    """

    op: str
    config: type[T]
    key: Callable[..., Key]
    buckets: Mapping[str, tuple[int, ...]]
    candidates: Callable[..., Iterable[T]]
    work: Callable[..., int]
    backend: str = "triton"

    def table(self, arch: Arch | None) -> Table:
        return table(self.op, arch, self.backend)

    def choose(self, **key: Value) -> T:
        """The configuration for a call of this tuning key on the architecture that kernels are launched for."""
        if _forced and (self.op, self.backend) in _forced:
            return _forced[self.op, self.backend]
        arch = platform.arch()
        cached = (self.op, self.backend, self.config, arch and arch.name, *key.items())  # cheaper than functools.cache
        return _chosen.get(cached) or self._choose(cached, arch, key)

    def _choose(self, cached: tuple, arch: Arch | None, key: Key) -> T:
        found = self.table(arch)
        row = next(row for row in found.rows if row.fits(key, found.file))
        if len(_chosen) >= 10_000:  # the key may hold lengths of prompts
            _chosen.clear()
        _chosen[cached] = made = build(self.config, row, found.file)
        return made

    @contextlib.contextmanager
    def forced(self, config: T) -> Iterator[None]:
        """Launches inside the block take `config` instead of the table's, for the tuner and for tests."""
        before = _forced.get((self.op, self.backend))
        _forced[self.op, self.backend] = config
        try:
            yield
        finally:
            if before is None:
                del _forced[self.op, self.backend]
            else:
                _forced[self.op, self.backend] = before


_chosen: dict[tuple, Any] = {}
_forced: dict[tuple[str, str], Any] = {}
