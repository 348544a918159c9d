"""The log of both processes: lines for people, or JSON."""

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
    logging.basicConfig(level=level.upper(), handlers=[handler])
