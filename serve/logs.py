"""The log of both processes: lines for people, or JSON."""

import io
import json
import logging
import sys

LINE = "[%(asctime)s] %(message)s"


class JsonLines(logging.Formatter):
    """An object per line, with the fields that a record brings as `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        said = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said | getattr(record, "fields", {}))


def configure(level: str, form: str = "text", prefix: str = "") -> None:
    """Write the log to stdout. form: "text" or "json". prefix: goes before each line of text."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(prefix + LINE))
    logging.raiseExceptions = False  # a line that a full disk does not take is lost, and no more
    logging.basicConfig(level=level.upper(), handlers=[handler])


def say(line: str) -> None:
    """A line on stdout for whoever waits for it."""
    try:
        print(line, flush=True)
    except OSError as error:
        logging.getLogger("wave64").warning("stdout: %s", error.strerror)


def close_stdout() -> None:
    """At the end of a process, whose exit status does not depend on what a full disk did not take."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = io.StringIO()  # Python flushes it once more
