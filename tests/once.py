"""What one worker of a run finds and the others read."""

import fcntl
import pickle
from collections.abc import Callable
from typing import Any


def once(request: Any, tmp_path_factory: Any, name: str, find: Callable[[], Any]) -> Any:
    """What `find` gives, found once for all workers of a run, under this name."""
    if not hasattr(request.config, "workerinput"):
        return find()
    shared = tmp_path_factory.getbasetemp().parent / f"{name}.pickle"  # workers of one run have this folder in common
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            shared.write_bytes(pickle.dumps(find()))
    return pickle.loads(shared.read_bytes())
