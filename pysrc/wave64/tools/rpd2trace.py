"""A profile of ROCm as a trace that Perfetto and chrome://tracing open: `python -m wave64 rpd2trace IN.rpd`.

    python -m wave64 rpd2trace IN.rpd [OUT.json.gz] [--start 10%] [--end 90%]

Rows of GPUs (a row for each queue), rows of the host's threads, an arrow from each call to what it put into a queue,
and for each GPU how many operations run, how many are in its queues and whether it idles. Times begin with the file's
first; what the profiler watched (clocks) is a row of its own. Rows are written as they are read.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from wave64.tools.rpd import NotAProfile, Profile, open_profile

GPU_PID = 1 << 24  # a GPU is a process of the trace; those of the host have smaller numbers
ARGS = 512  # characters of a call's arguments
quote = json.encoder.encode_basestring_ascii  # json.dumps of a string, without the way there


def window_of(profile: Profile, start: str | None, end: str | None) -> tuple[int, int] | None:
    """Nanoseconds from `start` to `end`, each "25%" of the whole or microseconds behind its begin; None for all of it.

    Raises ValueError for what is neither, and where the window is empty."""
    if start is None and end is None:
        return None
    length = profile.end - profile.start

    def offset(name: str, text: str | None, otherwise: int) -> int:
        if text is None:
            return otherwise
        try:
            value = float(text.removesuffix("%"))
            return round(length * value / 100 if text.endswith("%") else value * 1000)
        except (ValueError, OverflowError) as e:
            raise ValueError(f"--{name}: expected microseconds or a percentage, 2500 or 10%, got {text!r}") from e

    window = profile.start + offset("start", start, 0), profile.start + offset("end", end, length)
    if window[0] >= window[1]:
        raise ValueError(f"--start and --end: expected a window that is not empty, got {start or '0'} to "
                         f"{end or '100%'} of {length / 1000:.0f} us")
    return window


def write_trace(profile: Profile, out: TextIO, window: tuple[int, int] | None = None,
                progress: Callable[[int], None] = lambda rows: None) -> int:
    """Writes the trace as JSON; returns the number of its events."""
    origin = profile.start
    count, events = 0, _events(profile, origin, window)
    out.write(f'{{"displayTimeUnit":"ns","otherData":{{"source":{quote(profile.path.name)},"origin_ns":"{origin}"}},'
              '"traceEvents":[\n')
    while some := list(islice(events, 2000)):
        out.write((",\n" if count else "") + ",\n".join(some))
        count += len(some)
        if count % 100_000 == 0:
            progress(count)
    out.write("\n]}\n")
    return count


def _us(ns: int) -> str:
    """Microseconds with all three digits behind the point, of an integer of any size."""
    return f"{ns // 1000}.{ns % 1000:03d}" if ns >= 0 else f"-{_us(-ns)}"


def _events(profile: Profile, origin: int, window: tuple[int, int] | None) -> Iterator[str]:
    threads: set[tuple[int, int]] = set()
    queues: set[tuple[int, int]] = set()
    for _, pid, tid, start, end, name, args in profile.calls(window):
        threads.add((pid, tid))
        told = f',"args":{{"args":{quote(args[:ARGS])}}}' if args else ""
        yield (f'{{"ph":"X","pid":{pid},"tid":{tid},"ts":{_us(start - origin)},"dur":{_us(end - start)},"name":'
               f"{quote(name)}{told}}}")
    for _, gpu, queue, start, end, name, kind in profile.ops(window):
        queues.add((gpu, queue))
        yield (f'{{"ph":"X","pid":{GPU_PID + gpu},"tid":{_row(queue)},"ts":{_us(start - origin)},"dur":'
               f'{_us(end - start)},"name":{quote(name or kind)},"cat":{quote(kind)}}}')
    for number, (pid, tid, called, gpu, queue, start) in enumerate(profile.links(window)):
        same = f'"cat":"launch","name":"launch","id":{number}'
        yield f'{{"ph":"s",{same},"pid":{pid},"tid":{tid},"ts":{_us(called - origin)}}}'
        yield (f'{{"ph":"f","bp":"e",{same},"pid":{GPU_PID + gpu},"tid":{_row(queue)},"ts":{_us(start - origin)}}}')
    yield from _counters(profile, origin, window)
    for sample in profile.samples(window):
        yield (f'{{"ph":"C","pid":{GPU_PID + sample.gpu},"name":{quote(sample.name)},"ts":{_us(sample.start - origin)}'
               f',"args":{{"value":{sample.value:g}}}}}')
    for gpu in sorted({gpu for gpu, _ in queues}):
        yield _named("process", GPU_PID + gpu, 0, f"GPU {gpu}")
    for gpu, queue in sorted(queues):
        yield _named("thread", GPU_PID + gpu, _row(queue), f"queue {queue}")
    for pid in sorted({pid for pid, _ in threads}):
        yield _named("process", pid, 0, f"process {pid}")
    for pid, tid in sorted(threads):
        yield _named("thread", pid, tid, f"thread {tid}")


def _row(queue: int) -> int:
    """A queue's thread of the trace: viewers take a thread 0 for the operating system's idle one, of no process."""
    return queue + 1


def _named(what: str, pid: int, tid: int, name: str) -> str:
    return f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"{what}_name","args":{{"name":{quote(name)}}}}}'


def _counters(profile: Profile, origin: int, window: tuple[int, int] | None) -> Iterator[str]:
    """What runs, what is in the queues, and whether a GPU idles, each whenever it changes."""
    gpu, running, queued, shown, was_idle, at = -1, 0, 0, (-1, -1), None, 0

    def counter(idle: bool) -> str:
        head = f'{{"ph":"C","pid":{GPU_PID + gpu},"ts":{_us(at - origin)},"name":'
        change = f'{head}"idle","args":{{"idle":{int(idle)}}}}},\n' if idle != was_idle else ""
        return f'{change}{head}"operations","args":{{"running":{running},"queued":{queued - running}}}}}'

    for of, ns, run, queue in profile.edges(window):
        if (of, ns) != (gpu, at) and (running, queued) != shown and gpu >= 0:
            yield counter(running == 0)
            shown, was_idle = (running, queued), running == 0
        if of != gpu:
            gpu, running, queued, shown, was_idle = of, 0, 0, (-1, -1), None
        at, running, queued = ns, running + run, queued + queue
    if gpu >= 0:
        yield counter(running == 0)


def open_text(path: Path, packed: bool) -> TextIO:
    if packed:
        return io.TextIOWrapper(gzip.GzipFile(path, "wb", compresslevel=1), encoding="utf-8")
    return path.open("w", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m wave64 rpd2trace", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="IN.rpd")
    parser.add_argument("output", type=Path, metavar="OUT.json.gz", nargs="?", help="IN.json.gz if not given")
    parser.add_argument("--start", metavar="T", help="microseconds behind the first call, or a percentage: 10%%")
    parser.add_argument("--end", metavar="T", help="the same")
    options = parser.parse_args(argv)
    output = options.output or (options.input if options.input.name else Path("trace")).with_suffix(".json.gz")
    if output.resolve() == options.input.resolve():
        parser.error(f"OUT: expected another file than IN, got {output} for both")
    began, unfinished = time.monotonic(), output.with_name(output.name + ".part")
    try:
        with open_profile(options.input) as profile:
            window = window_of(profile, options.start, options.end)
            with open_text(unfinished, packed=output.suffix == ".gz") as file:
                count = write_trace(profile, file, window,
                                    lambda rows: print(f"\r{rows:,} events", end="", file=sys.stderr, flush=True))
        unfinished.rename(output)
    except (NotAProfile, OSError, ValueError) as e:
        print(f"wave64 rpd2trace: {e}", file=sys.stderr)
        return 1
    finally:
        with contextlib.suppress(NotADirectoryError):
            unfinished.unlink(missing_ok=True)
    print(f"\r{count:,} events in {time.monotonic() - began:.1f} s: {output}\nOpen it at https://ui.perfetto.dev.",
          file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
