"""Messages between the processes of this package: a length of four bytes, then JSON."""

import json
import math
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

HEAD_BYTES = 4


def frame(message: Any) -> bytes:
    """A message as bytes."""
    data = json.dumps(message, separators=(",", ":"), check_circular=False).encode()
    return struct.pack(">I", len(data)) + data


def length_of(head: bytes) -> int:
    """Bytes of the JSON that follows a head."""
    return int(struct.unpack(">I", head)[0])


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


class Channel:
    """One end of a socket pair: messages, each within a deadline (monotonic seconds), and open files.

    `parent` is a descriptor whose hang-up means that nobody waits for an answer: the time is up then.
    TimeoutError: the time is up; EOFError: the other end is gone.
    """

    def __init__(self, end: socket.socket, parent: int = -1) -> None:
        self.end, self._fd, self._parent = end, end.fileno(), parent
        end.setblocking(False)

    def send(self, message: Any, deadline: float = math.inf, files: Sequence[int] = ()) -> None:
        """Send a message, however much of it the other end takes at once."""
        view = memoryview(frame(message))
        try:
            if files:
                view = view[socket.send_fds(self.end, [view], list(files)) :]
            while view:
                try:
                    view = view[os.write(self._fd, view) :]  # a confined process may not call send
                except BlockingIOError:
                    self._wait(select.POLLOUT, deadline)
        except ConnectionError:
            raise EOFError("the other end is gone") from None

    def receive(self, deadline: float = math.inf) -> Any:
        """The next message."""
        return receive(lambda most: self._read(most, deadline))

    def receive_files(self) -> tuple[Any, list[int]]:
        """The next message, and the files that came with it."""
        self._wait(select.POLLIN, math.inf)
        head, files, _, _ = socket.recv_fds(self.end, HEAD_BYTES, 8)
        if not head:
            raise EOFError("the other end is gone")
        return json.loads(exactly(lambda most: self._read(most, math.inf), length_of(head))), files

    def quiet(self, seconds: float) -> bool:
        """Whether no message comes within `seconds`."""
        return not select.select([self._fd], [], [], seconds)[0]

    def _read(self, most: int, deadline: float) -> bytes:
        while True:
            try:
                return os.read(self._fd, most)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
            except ConnectionError:
                return b""

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._fd, event)
        if self._parent >= 0:
            poll.register(self._parent, 0)  # no events asked for: only a hang-up is reported
        left = None if deadline == math.inf else max(0.0, 1000 * (deadline - time.monotonic()))
        ready = poll.poll(left)
        if not ready or any(fd == self._parent for fd, _ in ready):
            raise TimeoutError


def failure(error: Exception) -> dict[str, Any]:
    """The reply about a task that raised."""
    if isinstance(error, MemoryError):
        return {"error": "memory ran out", "kind": "memory"}
    if isinstance(error, RecursionError):
        return {"error": "recursion too deep", "kind": "memory"}
    return {"error": f"{type(error).__name__}: {error}"[:500], "kind": "raised"}
