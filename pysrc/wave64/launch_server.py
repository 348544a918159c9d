"""`python -m wave64.launch_server --model-path ...`: serve a model over HTTP (wave64/serve/http/launch.py)."""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # nothing but imports to end yet; main() has its own handlers
    from wave64.serve.args import exit_unless_installed

    exit_unless_installed()
    from wave64.serve.http.launch import main

    raise SystemExit(main())
