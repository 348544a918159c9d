"""What the api process starts: `python -m wave64.serve.engine.process`, its settings as one line of JSON on stdin."""

import json
import logging
import os
import sys

from wave64.serve.args import ServerArgs

LOG_FORMAT = "[%(asctime)s] %(message)s"


def main() -> None:
    """Run the engine until it is told to end, or its parent is gone."""
    settings = json.loads(sys.stdin.readline())
    args = ServerArgs(**settings["args"])
    logging.basicConfig(level=args.log_level.upper(), format=LOG_FORMAT, stream=sys.stdout)
    from wave64.serve.engine.engine import run_engine

    status = 0
    try:
        if os.getppid() == settings["parent"]:  # else it ended while we imported, and run_engine could not know
            run_engine(args, settings["requests"], settings["outputs"])
    except SystemExit as end:
        status = end.code or 0
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # tearing down torch takes seconds on a busy machine, and the pipes are closed


if __name__ == "__main__":
    main()
