"""Who started which process, by /proc/<pid>/stat: every Linux has that, and /proc/<pid>/task/*/children only some."""

from pathlib import Path

PPID, START_TIME = 1, 19  # fields of stat behind the command's name


def children(pid: int) -> list[int]:
    """The processes that any thread of this one has started and not yet waited for, the oldest first."""
    found = [(int(fields[START_TIME]), each) for each in _processes() if (fields := _fields(each))
             and int(fields[PPID]) == pid]
    return [child for _, child in sorted(found)]


def engines(server: int) -> list[int]:
    """The processes of a server's ranks, rank 0 first, which has started the others."""
    found, parents = [], [server]
    while parents:
        parents = [child for parent in parents for child in children(parent)]
        found += [each for each in parents if b"wave64.serve.engine.process" in _command(each)]
    return found


def _processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]


def _fields(pid: int) -> list[str]:
    """What stat says behind the command's name, which may hold blanks and parentheses; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
