"""Messages between the processes of this package: a length of four bytes, then JSON."""

from __future__ import annotations

import json
import os
import struct
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
    """Send a complete message, in as many writes as the pipe needs."""
    data = frame(message)
    while data:
        data = data[os.write(fd, data) :]
