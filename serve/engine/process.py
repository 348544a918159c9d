"""What the api process starts, and rank 0 for every other rank of its host: `python -m wave64.serve.engine.process`,
its settings as one line of JSON on stdin."""

import json
import logging
import os
import sys
from typing import NoReturn

import zmq

from wave64.serve.args import ServerArgs
from wave64.serve.engine.follower import RankInfo, end_with, follow
from wave64.serve.engine.watchdog import dump_stacks_on_signal
from wave64.serve.logs import close_stdout, configure
from wave64.serve.messages import Failed, encode


def main() -> None:
    """Run the engine until a signal ends it, or its parent is gone."""
    dump_stacks_on_signal()
    settings = json.loads(sys.stdin.readline())
    args = ServerArgs(**settings["args"])
    end_with(settings["parent"])
    if "rank" in settings:
        info = RankInfo(**settings["rank"] | {"control": tuple(settings["rank"]["control"])})
        level = args.log_level if args.log_level == "debug" else "warning"  # rank 0 says what holds for all
        configure(level, args.log_format, f"rank {info.rank}: ")
        _exit(follow(args, info))
    configure(args.log_level, args.log_format)
    status = 0
    try:
        from wave64.serve.engine.engine import run_engine  # imports torch, and reads WAVE64_BACKEND

        run_engine(args, settings["requests"], settings["outputs"], settings["torchrun"])
    except ValueError as error:  # NotSupported: run_engine itself reports what it raises
        _fail(settings["outputs"], " ".join(str(error).split()))
        status = 1
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)  # words mean 1, None 0
    _exit(status)


def _exit(status: int) -> NoReturn:
    logging.shutdown()
    close_stdout()
    os._exit(status)  # tearing down torch takes seconds on a busy machine, and the pipes are closed


def _fail(outputs: str, error: str) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as outbox:
        outbox.setsockopt(zmq.LINGER, 1000)
        outbox.connect(outputs)
        outbox.send(encode(Failed(error)))


if __name__ == "__main__":
    main()
