"""What a rank says of itself first, and what has to be the same on all: version, flags and checkpoint."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from wave64.serve.args import ServerArgs, flag_of
from wave64.serve.engine.control import Hello

#: flags that may differ between hosts, because one process alone obeys them or the host is what they are about
OF_ONE_HOST = frozenset((
    "model_path", "host", "port", "api_key", "served_model_name", "chat_template", "tokenizer_path", "base_gpu_id",
    "node_rank", "dist_init_addr", "log_level", "log_level_http", "timeout_keep_alive", "stream_interval",
    "skip_server_warmup", "watchdog_timeout",
))  # fmt: skip


def hello(channel: str, rank: int, args: ServerArgs, folder: Path) -> Hello:
    """This process's introduction. folder: the checkpoint's."""
    flags = {name: value for name, value in asdict(args).items() if name not in OF_ONE_HOST}
    return Hello(channel, rank, socket.gethostname(), os.getpid(), version("wave64"), flags, _fingerprint(folder))


def unlike(ours: Hello, theirs: Hello) -> str | None:
    """In what the two differ, naming both; None if they work together."""
    def words(what: str, one: object, other: object) -> str:
        return (f"rank {theirs.rank} on host {theirs.host} has {what} {other}, rank {ours.rank} on host {ours.host} "
                f"has {one}; they have to be the same")

    if ours.version != theirs.version:
        return words("wave64", ours.version, theirs.version)
    for name in sorted(ours.flags.keys() | theirs.flags.keys()):
        one, other = (list(value) if isinstance(value, tuple) else value
                      for value in (ours.flags.get(name), theirs.flags.get(name)))
        if one != other:
            return words(flag_of(name), one, other)
    if ours.checkpoint != theirs.checkpoint:
        return words("a checkpoint with the fingerprint", ours.checkpoint, theirs.checkpoint)
    return None


def _fingerprint(folder: Path) -> str:
    """Of the configuration's bytes and of the weight files' names and sizes: no weight is read."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json" and not file.name.startswith("tokenizer"):
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix == ".safetensors":
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:12]
