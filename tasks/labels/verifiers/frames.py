"""Messages between the pool and its workers: a 4-byte big-endian length and that many bytes of JSON."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Write one message. JSON escapes lone surrogates, so every `str` survives the way."""
    body = json.dumps(message).encode("ascii")
    connection.sendall(_LENGTH.pack(len(body)))
    connection.sendall(body)


def receive(connection: socket.socket) -> dict[str, Any]:
    """Read one message.

    Raises EOFError when the other side is gone, TimeoutError when the connection's limit runs out.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    filled = 0
    while filled < length:
        count = connection.recv_into(view[filled:])
        if count == 0:
            raise EOFError("the other side is gone")
        filled += count
    return data
