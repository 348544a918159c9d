"""What Perfetto drops or misplaces of a trace in Chrome's JSON, as its table `stats` said, which
tests/trace_picture.py prints."""

from collections import defaultdict
from typing import Any


def lost(events: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a trace's events, a line each:

    - a thread 0 is the operating system's idle thread, of no process, and its name is not taken;
    - a slice that ends behind the one that it begins in is dropped; of two that begin together the first in the file
      is the outer one;
    - an arc without `id2` is in no process."""
    found, open_until = [], defaultdict(list)
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        what = f"{event['ph']} {event['name']} of {event['pid']}, {event.get('tid')} at {event.get('ts')}"
        if event.get("tid") == 0 and (event["ph"], event["name"]) != ("M", "process_name"):
            found.append(f"thread 0: {what}")
        if event["ph"] == "X":
            stack, end = open_until[event["pid"], event["tid"]], event["ts"] + event["dur"]
            while stack and stack[-1] <= event["ts"]:
                stack.pop()
            if stack and end > stack[-1]:
                found.append(f"overlaps: {what}")
            else:
                stack.append(end)
        if event["ph"] in ("b", "e") and "local" not in event.get("id2", {}):
            found.append(f"of no process: {what}")
    return found
