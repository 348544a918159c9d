"""What rank 0 and the other ranks of an engine say to each other, besides tensors: msgspec structs over TCP.

Every other rank opens two connections to rank 0's listener and introduces itself on each with `Hello`. On `steps` it
gets one `Step` after another; on `watch` it says every second that it lives and what it is doing, or that it has
failed. A connection that ends means that the process at its other end did.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec
from msgspec import Struct

from wave64.serve.engine.schedule import Schedule

LENGTH = struct.Struct("<I")
MAX_BYTES = 1 << 30


class Hello(Struct, tag=True):
    """Who opens this connection. What does not depend on the rank has to be the same on every one."""

    channel: str  # steps or watch
    rank: int
    host: str
    pid: int
    version: str
    flags: dict[str, Any]
    checkpoint: str  # fingerprint of the model's folder


class Beat(Struct, tag=True):
    """The rank lives. patience_s: how long it may be silent from here on; read, size: bytes of its weights so far, and
    of all of them."""

    device: str
    doing: str
    patience_s: float
    read: int = 0
    size: int = 0


class Died(Struct, tag=True):
    """The rank cannot go on; why, in one line."""

    device: str
    doing: str
    error: str


class Refused(Struct, tag=True):
    """Rank 0 does not work with this rank; why, in one line."""

    error: str


class Welcome(Struct, tag=True):
    """Rank 0 works with this rank, and they meet at torch's store there."""

    host: str
    port: int


class Step(Struct, tag=True):
    """One step of the engine: a Schedule for each attention group."""

    schedules: list[Schedule]


Message = Hello | Beat | Died | Refused | Welcome | Step

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class Channel:
    """Messages over one connected socket. Sending and receiving may each be done by one thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection

    @classmethod
    def connect(cls, host: str, port: int, timeout_s: float) -> Channel:
        """Raises OSError if no one listens there."""
        connection = socket.create_connection((host, port), timeout=timeout_s)
        connection.settimeout(None)
        return cls(connection)

    @property
    def own_address(self) -> str:
        """That of this end."""
        return self._socket.getsockname()[0]

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises OSError when the other end is gone."""
        self.send_frame(frame(message))

    def send_frame(self, encoded: bytes) -> None:
        """Send what `frame` made."""
        self._socket.sendall(encoded)

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message. Raises EOFError when the other end is gone, OSError, TimeoutError among them, and
        msgspec.DecodeError for what is no message."""
        self._socket.settimeout(timeout_s)
        try:
            size, = LENGTH.unpack(self._read(LENGTH.size))
            if size > MAX_BYTES:
                raise msgspec.DecodeError(f"expected a message of at most {MAX_BYTES} bytes, got {size}")
            return _decoder.decode(self._read(size))
        finally:
            self._socket.settimeout(None)

    def close(self) -> None:
        """The other end sees it."""
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError("the connection is closed")
            view = view[count:]
        return data


def frame(message: Message) -> bytes:
    """A message as it is sent."""
    encoded = _encoder.encode(message)
    return LENGTH.pack(len(encoded)) + encoded
