"""A profile of ROCm in an SQLite file, read only: RPD's tables, and those of rocprofiler-sdk's rocpd.

    with open_profile("trace.rpd") as profile:
        for op in profile.ops():     # what ran on a GPU: Op(id, gpu, queue, start, end, name, kind)
            ...

Both layouts become the same three temporary views (calls, ops, links), so that what is behind them knows one. RPD
(rocmProfileData, schema versions 2 and 3) has `rocpd_api`, `rocpd_op`, `rocpd_string`, `rocpd_api_ops`; newer files
have `rocpd_region`, `rocpd_kernel_dispatch` and `rocpd_memory_copy`, with a uuid behind each table's name and views
without it, with times in the rows or in `rocpd_timestamp`. All times are nanoseconds of the file's own clock. Rows
come from SQLite one at a time and what it sorts goes to its temporary files: memory stays constant.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

#: Either set makes a profile; what else a file has is used where it is there.
RPD = ("rocpd_api", "rocpd_op", "rocpd_string", "rocpd_api_ops")
ROCPD = ("rocpd_region", "rocpd_kernel_dispatch", "rocpd_string", "rocpd_info_kernel_symbol", "rocpd_info_process",
         "rocpd_info_thread")


class NotAProfile(ValueError):
    """The file cannot be read as a profile; the message says what it is and what is expected."""


class Call(NamedTuple):
    """A call of the HIP or HSA API, or a marked range, on a thread of the host."""

    id: int
    pid: int
    tid: int
    start: int
    end: int
    name: str
    args: str


class Op(NamedTuple):
    """A kernel, a copy or another operation on a queue of a GPU."""

    id: int
    gpu: int
    queue: int
    start: int
    end: int
    name: str
    kind: str


class Link(NamedTuple):
    """The call that put an operation into a queue, and that operation."""

    pid: int
    tid: int
    call_start: int
    gpu: int
    queue: int
    op_start: int


class Sample(NamedTuple):
    """A value of a GPU that was watched, from `start` on: its clock, its memory."""

    gpu: int
    name: str
    start: int
    value: float


class Profile:
    """An open file. `start` and `end`: the first and the last nanosecond of any call or operation in it."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path, self._db = path, connection
        self._tables = _tables(connection)
        self._sessions = sorted(name.removeprefix(ROCPD[0]) for name in self._tables if name.startswith(ROCPD[0])
                                and not _missing(self._tables, ROCPD, name.removeprefix(ROCPD[0])))
        if not _missing(self._tables, RPD):
            self._rpd_views()
        elif self._sessions:
            self._rocpd_views()
        else:
            raise NotAProfile(f"{path}: expected the tables of a profile, {', '.join(RPD)} (RPD) or "
                              f"{', '.join(ROCPD)} (rocprofv3's rocpd), got "
                              f"{', '.join(sorted(self._tables)) or 'no table at all'}: record one with "
                              "`runTracer.sh -o trace.rpd COMMAND` or `rocprofv3 --output-format rocpd`")
        bounds = [row for view in ("w64_calls", "w64_ops")
                  for row in self._rows(f'SELECT min("start"), max("end") FROM {view} WHERE "start" > 0')
                  if row[0] is not None]
        self.start = min((row[0] for row in bounds), default=0)
        self.end = max((row[1] for row in bounds), default=0)

    def calls(self, window: tuple[int, int] | None = None) -> Iterator[Call]:
        return map(Call._make, self._select("w64_calls", "id, pid, tid, start, end, name, args", window))

    def ops(self, window: tuple[int, int] | None = None) -> Iterator[Op]:
        return map(Op._make, self._select("w64_ops", "id, gpu, queue, start, end, name, kind", window))

    def links(self, window: tuple[int, int] | None = None) -> Iterator[Link]:
        inside = "" if window is None else 'WHERE c."end" >= ? AND c."start" <= ? AND o."end" >= ? AND o."start" <= ?'
        return map(Link._make, self._rows(
            'SELECT c.pid, c.tid, c."start", o.gpu, o.queue, o."start" FROM w64_links l JOIN w64_calls c ON c.id = '
            f"l.call_id JOIN w64_ops o ON o.id = l.op_id {inside}", (window or ()) * 2))

    def samples(self, window: tuple[int, int] | None = None) -> Iterator[Sample]:
        if "rocpd_monitor" not in self._tables:
            return
        for gpu, name, start, value in self._rows(
                'SELECT deviceId, monitorType, "start", value FROM rocpd_monitor '
                + ("" if window is None else 'WHERE "end" >= ? AND "start" <= ?'), window or ()):
            with contextlib.suppress(ValueError):  # a value that is no number draws no line
                yield Sample(gpu, name, start, float(value))

    def edges(self, window: tuple[int, int] | None = None) -> Iterator[tuple[int, int, int, int]]:
        """(gpu, ns, change of what runs, change of what is in the queues), by GPU and time: an operation is in a queue
        from its call on, runs from its start, and leaves both at its end."""
        inside = "" if window is None else 'WHERE o."end" >= ? AND o."start" <= ?'
        called = 'coalesce((SELECT min(c."start", o."start") FROM w64_links l JOIN w64_calls c ON c.id = l.call_id ' \
                 'WHERE l.op_id = o.id), o."start")'
        return self._rows(
            f"SELECT o.gpu, {called}, 0, 1 FROM w64_ops o {inside} UNION ALL SELECT o.gpu, o.\"start\", 1, 0 FROM "
            f'w64_ops o {inside} UNION ALL SELECT o.gpu, o."end", -1, -1 FROM w64_ops o {inside} '
            "ORDER BY 1, 2, 3 DESC, 4 DESC", (window or ()) * 3)

    def by_name(self, window: tuple[int, int] | None = None) -> Iterator[tuple[str, int, int, int, int]]:
        """(name, operations, their ns, the shortest, the longest), the most time first."""
        inside = "" if window is None else 'WHERE "end" >= ? AND "start" <= ?'
        return self._rows(
            'SELECT CASE WHEN name = \'\' THEN kind ELSE name END, count(*), sum("end" - "start"), '
            f'min("end" - "start"), max("end" - "start") FROM w64_ops {inside} GROUP BY 1 ORDER BY 3 DESC, 1',
            window or ())

    def _select(self, view: str, columns: str, window: tuple[int, int] | None) -> Iterator[tuple]:
        inside = "" if window is None else 'WHERE "end" >= ? AND "start" <= ?'
        quoted = ", ".join(f'"{each}"' for each in columns.split(", "))
        return self._rows(f"SELECT {quoted} FROM {view} {inside}", window or ())

    def _rows(self, query: str, values: tuple = ()) -> Iterator[tuple]:
        try:
            yield from self._db.execute(query, values)
        except sqlite3.Error as e:  # a truncated file shows where the missing pages are read
            raise _unreadable(self.path, e) from e

    def _rpd_views(self) -> None:
        arguments = "rocpd_ustring" if "rocpd_ustring" in self._tables else "rocpd_string"
        self._view("w64_calls",
                   f"a.id AS id, {_number('a.pid')} AS pid, {_number('a.tid')} AS tid, {_span('a.start', 'a.end')}, "
                   f"{_string('n', 'a.apiName_id')} AS name, coalesce(CAST(g.string AS TEXT), '') AS args FROM "
                   f"rocpd_api a LEFT JOIN rocpd_string n ON n.id = a.apiName_id LEFT JOIN {arguments} g ON "
                   "g.id = a.args_id")
        self._view("w64_ops",
                   f"o.id AS id, {_number('o.gpuId')} AS gpu, {_number('o.queueId')} AS queue, "
                   f"{_span('o.start', 'o.end')}, {_string('d', 'o.description_id')} AS name, "
                   f"{_string('t', 'o.opType_id')} AS kind FROM rocpd_op o LEFT JOIN rocpd_string d ON "
                   "d.id = o.description_id LEFT JOIN rocpd_string t ON t.id = o.opType_id")
        self._link(["api_id, op_id FROM rocpd_api_ops"])

    def _rocpd_views(self) -> None:
        """One session's tables have its uuid behind their names; ids count anew in each session."""
        calls, ops, links = [], [], []
        for number, session in enumerate(self._sessions):
            have = {name.removesuffix(session) for name in self._tables if name.endswith(session)}

            def unique(row_id: str, kind: int, number: int = number) -> str:
                return f"(({row_id}) * {len(self._sessions)} + {number}) * 2 + {kind}"

            calls.append(self._rocpd_calls(session, unique))
            for kind, (table, name, label) in enumerate((("rocpd_kernel_dispatch", "kernel", "KernelExecution"),
                                                         ("rocpd_memory_copy", "copy", "Copy"))):
                if table in have:
                    ops.append(self._rocpd_ops(table, session, unique("o.id", kind), name, label))
                    if "rocpd_event" in have:
                        links.append(f"{unique('r.id', 0)}, {unique('o.id', kind)} FROM \"{table}{session}\" o JOIN "
                                     f'"rocpd_event{session}" e ON e.id = o.event_id JOIN w64_stacks s ON s.stack = '
                                     f"e.stack_id AND s.session = {number} JOIN \"rocpd_region{session}\" r ON r.id = "
                                     "s.region")
        self._view("w64_calls", " UNION ALL SELECT ".join(calls))
        self._view("w64_ops", " UNION ALL SELECT ".join(ops))
        self._db.execute("CREATE TEMP TABLE w64_stacks (session INTEGER, stack INTEGER, region INTEGER, "
                         "PRIMARY KEY (session, stack)) WITHOUT ROWID")
        for number, session in enumerate(self._sessions if links else ()):
            self._db.execute(f'INSERT INTO w64_stacks SELECT {number}, e.stack_id, min(r.id) FROM '
                             f'"rocpd_region{session}" r JOIN "rocpd_event{session}" e ON e.id = r.event_id '
                             "WHERE e.stack_id > 0 GROUP BY e.stack_id")
        self._link(links)

    def _rocpd_calls(self, session: str, unique: Callable[[str, int], str]) -> str:
        """The SELECT (without the word) of one session's calls."""
        columns = self._columns(f"rocpd_region{session}")
        start, end, joins = _times(columns, "r", session)
        whose = "r"
        if "tid" not in columns:
            whose = "k"
            joins += f' LEFT JOIN "rocpd_track{session}" k ON k.id = r.track_id'
        joins += (f' LEFT JOIN "rocpd_info_process{session}" p ON p.id = {whose}.pid LEFT JOIN '
                  f'"rocpd_info_thread{session}" t ON t.id = {whose}.tid LEFT JOIN "rocpd_string{session}" n ON '
                  "n.id = r.name_id")
        return (f"{unique('r.id', 0)} AS id, {_number('p.pid')} AS pid, {_number('t.tid')} AS tid, "
                f"{_span(start, end)}, {_string('n', 'r.name_id')} AS name, '' AS args FROM "
                f'"rocpd_region{session}" r{joins}')

    def _rocpd_ops(self, table: str, session: str, number: str, name: str, label: str) -> str:
        """The SELECT (without the word) of one table's operations."""
        columns = self._columns(f"{table}{session}")
        start, end, joins = _times(columns, "o", session)
        agent = "o.agent_id" if "agent_id" in columns else "o.dst_agent_id"
        queue = "o.queue_id"
        if "queue_id" not in columns:
            joins += f' LEFT JOIN "rocpd_track{session}" k ON k.id = o.track_id'
            agent, queue = "k.agent_id", "k.queue_id"
        gpu = agent
        if f"rocpd_info_agent{session}" in self._tables:
            joins += f' LEFT JOIN "rocpd_info_agent{session}" a ON a.id = {agent}'
            gpu = f"coalesce(a.type_index, a.absolute_index, {agent})"
        if name == "kernel":
            shown = "coalesce(s.display_name, s.kernel_name, 'kernel ' || o.kernel_id)"
            joins += f' LEFT JOIN "rocpd_info_kernel_symbol{session}" s ON s.id = o.kernel_id'
        else:
            shown = _string("s", "o.name_id")
            joins += f' LEFT JOIN "rocpd_string{session}" s ON s.id = o.name_id'
        return (f"{number} AS id, {_number(gpu)} AS gpu, {_number(queue)} AS queue, {_span(start, end)}, "
                f"{shown} AS name, '{label}' AS kind FROM \"{table}{session}\" o{joins}")

    def _link(self, selects: list[str]) -> None:
        """One call for each operation, to be found by the operation: files need not have an index for that."""
        self._db.execute("CREATE TEMP TABLE w64_links (call_id INTEGER, op_id INTEGER PRIMARY KEY)")
        for select in selects:
            self._db.execute(f"INSERT OR IGNORE INTO w64_links SELECT {select}")

    def _view(self, name: str, select: str) -> None:
        try:
            self._db.execute(f"CREATE TEMP VIEW {name} AS SELECT {select}")
            self._db.execute(f"SELECT * FROM {name} LIMIT 1")
        except sqlite3.Error as e:
            raise NotAProfile(f"{self.path}: expected the columns of RPD's schema 2 or 3 or of rocpd's schema 3, got "
                              f"others ({e}): which tool wrote it?") from e

    def _columns(self, table: str) -> set[str]:
        return {row[1] for row in self._db.execute(f'PRAGMA table_info("{table}")')}


@contextlib.contextmanager
def open_profile(path: str | Path) -> Iterator[Profile]:
    """The profile in `path`, which is never written to. Raises NotAProfile for what is none, FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a profile, got {'a folder' if path.is_dir() else 'no such file'}")
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        try:
            connection.execute("PRAGMA temp_store = FILE")
            connection.execute("PRAGMA cache_size = -4096")
            profile = Profile(path, connection)
        except sqlite3.Error as e:
            raise _unreadable(path, e) from e
        yield profile


def _unreadable(path: Path, error: sqlite3.Error) -> NotAProfile:
    with path.open("rb") as file:
        begun = file.read(15) == b"SQLite format 3"
    got = "a damaged one" if begun else f"{path.stat().st_size} bytes of something else"
    why = ": was the traced program killed, or the file copied while it was written?" if begun else ""
    return NotAProfile(f"{path}: expected a whole SQLite file, got {got} ({error}){why}")


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _missing(tables: set[str], wanted: tuple[str, ...], session: str = "") -> list[str]:
    return [table for table in wanted if table + session not in tables]


def _number(value: str) -> str:
    """An integer, whatever a damaged row holds."""
    return f"coalesce(CAST({value} AS INTEGER), 0)"


def _span(start: str, end: str) -> str:
    """The columns `start` and `end`, which is not before it. `end` is a word of SQL: quoted."""
    start, end = (re.sub(r"\.(start|end)$", r'."\1"', each) for each in (start, end))
    return f'{_number(start)} AS "start", max({_number(start)}, {_number(end)}) AS "end"'


def _string(alias: str, number: str) -> str:
    """A string of the string table, or its number where the table lacks it."""
    return f"coalesce(CAST({alias}.string AS TEXT), 'string ' || {number}, '')"


def _times(columns: set[str], alias: str, session: str) -> tuple[str, str, str]:
    """Start, end and the joins that they need: a row holds its times or refers to them."""
    if "start" in columns:
        return f"{alias}.start", f"{alias}.end", ""
    return ("ts.value", "te.value", "".join(
        f' JOIN "rocpd_timestamp{session}" {short} ON {short}.id = {alias}.{column}'
        for short, column in (("ts", "start_id"), ("te", "end_id"))))
