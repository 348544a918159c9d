"""Profiles of ROCm: files in the shapes that RPD and rocprofv3 write, made here, read, converted and broken."""

import gzip
import itertools
import json
import random
import sqlite3
from pathlib import Path

import pytest
import trace_viewer
from hypothesis import given, settings
from hypothesis import strategies as st

from wave64.tools import rpd2trace, rpd_report
from wave64.tools.rpd import NotAProfile, open_profile
from wave64.tools.rpd2trace import GPU_PID

BASE = 1_732_900_000_000_000_000  # nanoseconds since 1970: more digits than a float holds

RPD_TABLES = """
CREATE TABLE rocpd_string (id INTEGER PRIMARY KEY, string TEXT NOT NULL);
CREATE TABLE rocpd_api (id INTEGER PRIMARY KEY, pid INTEGER, tid INTEGER, start INTEGER, "end" INTEGER,
                        apiName_id INTEGER, args_id INTEGER);
CREATE TABLE rocpd_op (id INTEGER PRIMARY KEY, gpuId INTEGER, queueId INTEGER, sequenceId INTEGER, start INTEGER,
                       "end" INTEGER, description_id INTEGER, opType_id INTEGER);
CREATE TABLE rocpd_api_ops (id INTEGER PRIMARY KEY, api_id INTEGER, op_id INTEGER);
CREATE TABLE rocpd_monitor (id INTEGER PRIMARY KEY, deviceType TEXT, deviceId INTEGER, monitorType TEXT,
                            start INTEGER, "end" INTEGER, value TEXT);
"""
STRINGS = ["hipLaunchKernel", "gemm", 'attention<"x">', "KernelExecution", "", "0x7f grid=1"]

#: (call: pid, tid, start, end), (its operation: gpu, queue, start, end, number of its name), relative nanoseconds.
CALLS = [((7, 7, 0, 400), (2, 0, 1000, 3001, 2)), ((7, 8, 100, 300), (2, 1, 2000, 2500, 3)),
         ((7, 7, 500, 600), (0, 0, 4000, 6000, 2)), ((7, 7, 700, 800), (2, 0, 3001, 5001, 2))]


def save_rpd(path: Path, calls=CALLS, more: str = "") -> Path:
    with sqlite3.connect(path) as db:
        db.executescript(RPD_TABLES)
        db.executemany("INSERT INTO rocpd_string VALUES (?, ?)", enumerate(STRINGS, 1))
        for number, (call, op) in enumerate(calls, 1):
            db.execute("INSERT INTO rocpd_api VALUES (?, ?, ?, ?, ?, 1, 6)",
                       (number, *call[:2], BASE + call[2], BASE + call[3]))
            if op:
                db.execute("INSERT INTO rocpd_op VALUES (?, ?, ?, 0, ?, ?, ?, 4)",
                           (number, op[0], op[1], BASE + op[2], BASE + op[3], op[4]))
                db.execute("INSERT INTO rocpd_api_ops VALUES (NULL, ?, ?)", (number, number))
        db.execute("INSERT INTO rocpd_monitor VALUES (1, 'gpu', 2, 'sclk', ?, ?, '1700'), (2, 'gpu', 2, 'sclk', ?, ?, "
                   "'n/a')", (BASE + 10, BASE + 20, BASE + 20, BASE + 30))
        db.executescript(more)
    db.close()
    return path


def save_rocpd(path: Path, sessions=("_0000a1b2_9f00_7000_8000_000000000001",), tracks: bool = False) -> Path:
    """The same, as rocprofv3 writes it: a uuid behind each name, times in the rows or (`tracks`) referred to."""
    with sqlite3.connect(path) as db:
        for shift, session in enumerate(sessions):
            times = "start_id INTEGER, end_id INTEGER, track_id INTEGER" if tracks else 'start BIGINT, "end" BIGINT'
            whose = "" if tracks else ", pid INTEGER, tid INTEGER"
            db.executescript(f"""
                CREATE TABLE rocpd_string{session} (id INTEGER PRIMARY KEY, guid TEXT, string TEXT);
                CREATE TABLE rocpd_info_process{session} (id INTEGER PRIMARY KEY, pid INTEGER);
                CREATE TABLE rocpd_info_thread{session} (id INTEGER PRIMARY KEY, tid INTEGER);
                CREATE TABLE rocpd_info_agent{session} (id INTEGER PRIMARY KEY, type TEXT, absolute_index INTEGER,
                                                        type_index INTEGER);
                CREATE TABLE rocpd_info_kernel_symbol{session} (id INTEGER PRIMARY KEY, kernel_name TEXT,
                                                                display_name TEXT);
                CREATE TABLE rocpd_event{session} (id INTEGER PRIMARY KEY, stack_id INTEGER);
                CREATE TABLE rocpd_timestamp{session} (id INTEGER PRIMARY KEY, value BIGINT);
                CREATE TABLE rocpd_track{session} (id INTEGER PRIMARY KEY, pid INTEGER, tid INTEGER, agent_id INTEGER,
                                                   queue_id INTEGER);
                CREATE TABLE rocpd_region{session} (id INTEGER PRIMARY KEY, name_id INTEGER, event_id INTEGER,
                                                    {times}{whose});
                CREATE TABLE rocpd_kernel_dispatch{session} (
                    id INTEGER PRIMARY KEY, kernel_id INTEGER, event_id INTEGER,
                    {times}{"" if tracks else ", agent_id INTEGER, queue_id INTEGER"});
                CREATE VIEW IF NOT EXISTS rocpd_string AS SELECT * FROM rocpd_string{session};
                INSERT INTO rocpd_string{session} VALUES (1, 'g', 'hipLaunchKernel');
                INSERT INTO rocpd_info_process{session} VALUES (1, 7);
                INSERT INTO rocpd_info_thread{session} VALUES (1, 7), (2, 8);
                INSERT INTO rocpd_info_agent{session} VALUES (1, 'CPU', 0, 0), (2, 'GPU', 1, 0), (4, 'GPU', 3, 2);
                INSERT INTO rocpd_info_kernel_symbol{session} VALUES (2, 'gemm.kd', 'gemm'),
                                                                     (3, 'a', 'attention<"x">');
            """)
            stamp, event, track = itertools.count(1), itertools.count(1), itertools.count(1)

            def timed(start: int, end: int, whose: tuple[int, ...], what: str, session=session, stamp=stamp,
                      track=track, shift=shift) -> tuple:
                times = BASE + 10_000 * shift + start, BASE + 10_000 * shift + end
                if not tracks:
                    return (*times, *whose)
                numbers = next(stamp), next(stamp), next(track)
                db.executemany(f"INSERT INTO rocpd_timestamp{session} VALUES (?, ?)",
                               zip(numbers, times, strict=False))
                db.execute(f"INSERT INTO rocpd_track{session} (id, {what}) VALUES (?, ?, ?)", (numbers[2], *whose))
                return numbers

            for number, (call, op) in enumerate(CALLS, 1):
                events = next(event), next(event)
                db.executemany(f"INSERT INTO rocpd_event{session} VALUES (?, ?)", [(each, number) for each in events])
                row = timed(call[2], call[3], (1, call[1] - 6), "pid, tid")
                db.execute(f"INSERT INTO rocpd_region{session} VALUES ({', '.join('?' * (3 + len(row)))})",
                           (len(CALLS) + 1 - number if shift else number, 1, events[0], *row))
                row = timed(op[2], op[3], (2 + op[0], op[1]), "agent_id, queue_id")
                db.execute(f"INSERT INTO rocpd_kernel_dispatch{session} VALUES ({', '.join('?' * (3 + len(row)))})",
                           (number, op[4], events[1], *row))
    db.close()
    return path


MAKERS = {"rpd": save_rpd, "rocpd": save_rocpd, "rocpd, times apart": lambda path: save_rocpd(path, tracks=True)}


def converted(path: Path, *flags: str) -> dict:
    assert rpd2trace.main([str(path), str(path.with_suffix(".json.gz")), *flags]) == 0
    with gzip.open(path.with_suffix(".json.gz"), "rt") as file:
        return json.load(file)


@pytest.mark.parametrize("maker", MAKERS)
def test_every_call_operation_and_link_is_in_the_trace(maker, tmp_path):
    trace = converted(MAKERS[maker](tmp_path / "a.rpd"))
    slices = sorted((e["pid"], e["tid"], e["ts"], e["dur"], e["name"]) for e in trace["traceEvents"] if e["ph"] == "X")
    wanted = [(c[0], c[1], c[2] / 1e3, (c[3] - c[2]) / 1e3, "hipLaunchKernel") for c, _ in CALLS]
    wanted += [(GPU_PID + o[0], o[1] + 1, o[2] / 1e3, (o[3] - o[2]) / 1e3, STRINGS[o[4] - 1]) for _, o in CALLS]
    assert slices == sorted(wanted)
    flows = {phase: sorted((e["id"], e["pid"], e["tid"], e["ts"]) for e in trace["traceEvents"] if e["ph"] == phase)
             for phase in "sf"}
    assert [flow[0] for flow in flows["s"]] == [flow[0] for flow in flows["f"]] == list(range(len(CALLS)))
    assert sorted((s[1:], f[1:]) for s, f in zip(flows["s"], flows["f"], strict=True)) == sorted(
        ((c[0], c[1], c[2] / 1e3), (GPU_PID + o[0], o[1] + 1, o[2] / 1e3)) for c, o in CALLS)
    assert trace_viewer.lost(trace["traceEvents"]) == []
    named = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M" and e["pid"] >= GPU_PID}
    assert named == {name for _, o in CALLS for name in (f"GPU {o[0]}", f"queue {o[1]}")}
    assert trace["otherData"]["origin_ns"] == str(BASE)


def test_counters_follow_what_runs_and_what_waits(tmp_path):
    trace = converted(save_rpd(tmp_path / "a.rpd"))
    of_gpu = [e for e in trace["traceEvents"] if e["ph"] == "C" and e["pid"] == GPU_PID + 2]
    operations = [(e["ts"], e["args"]["running"], e["args"]["queued"]) for e in of_gpu if e["name"] == "operations"]
    assert operations == [(0, 0, 1), (0.1, 0, 2), (0.7, 0, 3), (1.0, 1, 2), (2.0, 2, 1), (2.5, 1, 1), (3.001, 1, 0),
                          (5.001, 0, 0)]
    assert [(e["ts"], e["args"]["idle"]) for e in of_gpu if e["name"] == "idle"] == [(0, 1), (1.0, 0), (5.001, 1)]
    assert [(e["ts"], e["args"]["value"]) for e in of_gpu if e["name"] == "sclk"] == [(0.01, 1700)]  # not 'n/a'


def test_a_window_keeps_what_overlaps_it(tmp_path):
    path = save_rpd(tmp_path / "a.rpd")
    for flags, wanted in ((["--start", "50%"], ["gemm"] * 3), (["--start", "3.5", "--end", "3.9"], ["gemm"]),
                          (["--end", "0.05"], ["hipLaunchKernel"])):
        names = [e["name"] for e in converted(path, *flags)["traceEvents"] if e["ph"] == "X"]
        assert names == wanted, flags


@pytest.mark.parametrize(("flags", "words"), [
    (["--start", "abc"], "--start: expected microseconds or a percentage, 2500 or 10%, got 'abc'"),
    (["--start", "nan"], "--start: expected microseconds"), (["--end", "inf%"], "--end: expected microseconds"),
    (["--start", "90%", "--end", "10%"], "expected a window that is not empty, got 90% to 10%")])
def test_a_window_that_is_none_is_refused(flags, words, tmp_path, capsys):
    path = save_rpd(tmp_path / "a.rpd")
    assert rpd2trace.main([str(path), *flags]) == 1
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]


def test_several_sessions_of_a_file_stay_apart(tmp_path):
    """Ids count anew in each session: a kernel's name and call are those of its own."""
    path = save_rocpd(tmp_path / "a.db", sessions=("_1a", "_2b"))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE rocpd_info_kernel_symbol_2b SET display_name = display_name || ' of b'")
    db.close()
    with open_profile(path) as profile:
        ops, links = list(profile.ops()), list(profile.links())
    assert sorted(op.name for op in ops if op.start >= BASE + 10_000) == ['attention<"x"> of b', *["gemm of b"] * 3]
    assert len(ops) == len({op.id for op in ops}) == 2 * len(CALLS)
    assert sorted((link.call_start, link.op_start) for link in links) == sorted(
        (BASE + shift + call[2], BASE + shift + op[2]) for call, op in CALLS for shift in (0, 10_000))


def test_top_and_diff_say_where_the_time_went(tmp_path, capsys):
    before = save_rpd(tmp_path / "a.rpd")
    after = save_rpd(tmp_path / "b.rpd", calls=[*CALLS[1:], ((7, 7, 6000, 6100), (2, 0, 7000, 8000, 5))])
    assert rpd_report.main(["top", str(before)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["3", "6.0", "2.00", "2.00", "2.00", "92.31", "gemm"]
    assert said[2].split()[:3] == ["1", "0.5", "0.50"]
    assert said[2].endswith('attention<"x">')
    assert said[-2:] == ["GPU 0: busy 33.3 % of the time", "GPU 2: busy 66.7 % of the time"]
    assert rpd_report.main(["diff", str(before), str(after), "--limit", "2"]) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[1] == ["3", "->", "2", "6.0", "4.0", "-2.0", "-33.3", "%", "gemm"]
    assert said[2] == ["0", "->", "1", "0.0", "1.0", "+1.0", "new", "KernelExecution"]
    assert said[3][:6] == ["4", "->", "4", "6.5", "5.5", "-1.0"]


def test_odd_rows_are_shown_as_they_are(tmp_path):
    """Times that run back, names that are missing, bytes that are no UTF-8, operations without a call."""
    trace = converted(save_rpd(tmp_path / "a.rpd", more=f"""
        INSERT INTO rocpd_op VALUES (90, 5, 0, 0, {BASE + 50}, {BASE + 20}, 99, 4);
        INSERT INTO rocpd_string VALUES (50, CAST(x'ff41' AS TEXT));
        INSERT INTO rocpd_api VALUES (91, 7, 7, {BASE + 1}, {BASE + 2}, 50, NULL);
        INSERT INTO rocpd_api_ops VALUES (NULL, 500, 90), (NULL, 1, 900), (NULL, 2, 1);"""))
    events = trace["traceEvents"]
    assert [(e["dur"], e["name"]) for e in events if e["ph"] == "X" and e["pid"] == GPU_PID + 5] == [(0, "string 99")]
    assert [e["name"] for e in events if e["ph"] == "X" and e["ts"] == 0.001] == ["\ufffdA"]
    assert sum(e["ph"] == "s" for e in events) == len(CALLS)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("empty.rpd", b"", "expected the tables of a profile"),
    ("text.rpd", b"not a database at all" * 50, "expected a whole SQLite file, got 1050 bytes of something else"),
    ("missing.rpd", None, "expected a profile, got no such file")])
def test_what_is_no_profile_is_said_to_be_none(name, content, words, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for command in (lambda: rpd2trace.main([str(path)]), lambda: rpd_report.main(["top", str(path)]),
                    lambda: rpd_report.main(["diff", str(path), str(path)])):
        assert command() == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / name).with_suffix(".json.gz").exists()


def test_a_folder_and_an_output_that_cannot_be_written_are_refused_in_words(tmp_path, capsys, monkeypatch):
    path = save_rpd(tmp_path / "a.rpd", calls=CALLS)
    monkeypatch.chdir(tmp_path)
    for arguments, words in ((["."], ".: expected a profile, got a folder"),
                         ([str(path), str(path / "x" / "out.json.gz")], "Not a directory")):
        assert rpd2trace.main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("wave64 rpd2trace: ")
        assert words in said


def test_another_database_is_refused_with_what_is_missing(tmp_path):
    for tables in (["CREATE TABLE users (id INTEGER)"], RPD_TABLES.replace("pid INTEGER", "pod INTEGER").split(";")):
        path = tmp_path / f"{len(tables)}.db"
        with sqlite3.connect(path) as db:
            for table in tables:
                db.execute(table)
        db.close()
        with pytest.raises(NotAProfile, match="users|columns"), open_profile(path) as profile:
            list(profile.calls())


def test_a_page_that_cannot_be_read_leaves_no_half_a_trace(tmp_path, capsys):
    path = save_rpd(tmp_path / "a.rpd", calls=CALLS * 100)
    whole = path.read_bytes()
    found = set()
    for page in range(1, len(whole) // 4096):
        path.write_bytes(whole[: page * 4096] + bytes(4096) + whole[(page + 1) * 4096 :])
        found.add(rpd2trace.main([str(path), str(tmp_path / "out.json.gz")]))
        assert not list(tmp_path.glob("*.part"))
    assert 1 in found
    assert "a damaged one" in capsys.readouterr().err


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_damaged_file_ends_in_words(seed, tmp_path_factory):
    """Truncated anywhere, or with bytes overwritten: a trace, or NotAProfile; nothing else."""
    draw = random.Random(seed)
    path = tmp_path_factory.mktemp("damaged") / "a.rpd"
    save_rpd(path, calls=CALLS * 40)
    data = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        data = data[: draw.randrange(len(data))]
    else:
        for _ in range(draw.randrange(1, 200)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)
    for command in (["top", str(path)], ["diff", str(path), str(path)]):
        assert rpd_report.main(command) in (0, 1)
    assert rpd2trace.main([str(path)]) in (0, 1)
    assert not list(path.parent.glob("*.part"))
