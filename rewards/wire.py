"""Messages between the processes of this package: a length of four bytes, then JSON."""

import json
import os
import struct
from collections.abc import Callable
from typing import Any

HEAD_BYTES = 4


def frame(message: Any) -> bytes:
    """A message as bytes."""
    data = json.dumps(message, separators=(",", ":"), check_circular=False).encode()
    return struct.pack(">I", len(data)) + data


def length_of(head: bytes) -> int:
    """Bytes of the JSON that follows a head."""
    return int(struct.unpack(">I", head)[0])


def write(fd: int, message: Any) -> None:
    """Send a message, however much of it the pipe takes at once."""
    write_all(fd, frame(message))


def write_all(fd: int, data: bytes) -> None:
    """Write bytes, however much of them the pipe takes at once."""
    while data:
        data = data[os.write(fd, data) :]


def exactly(read: Callable[[int], bytes], length: int) -> bytes:
    """`length` bytes from `read`, which may return fewer than asked for; EOFError where it returns none."""
    parts = []
    while length:
        part = read(min(length, 1 << 20))
        if not part:
            raise EOFError("the other end is gone")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def receive(read: Callable[[int], bytes]) -> Any:
    """The next message; raises as `exactly` does."""
    return json.loads(exactly(read, length_of(exactly(read, HEAD_BYTES))))


def failure(error: Exception) -> dict[str, Any]:
    """The reply about a task that raised."""
    if isinstance(error, MemoryError):
        return {"error": "memory ran out", "kind": "memory"}
    if isinstance(error, RecursionError):
        return {"error": "recursion too deep", "kind": "memory"}
    return {"error": f"{type(error).__name__}: {error}"[:500], "kind": "raised"}
