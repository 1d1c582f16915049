"""Messages between the processes of this package: a length of four bytes, then JSON."""

import json
import math
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

_HEAD_BYTES = 4
_read, _write = os.read, os.write  # as they are before a program or a test replaces them


class Channel:
    """One end of a socket pair: messages, each within a deadline (monotonic seconds), and open files.

    `parent` is a descriptor whose hang-up means that nobody waits for an answer: the time is up then.
    TimeoutError: the time is up; EOFError: the other end is gone; OverflowError: a message of more than
    `longest` bytes; ValueError or RecursionError: one that is no JSON."""

    def __init__(self, fd: int, parent: int = -1, longest: float = math.inf) -> None:
        self.fd, self._parent, self._longest = fd, parent, longest
        os.set_blocking(fd, False)

    def send(self, message: Any, deadline: float = math.inf, files: Sequence[int] = ()) -> None:
        """Send a message, however much of it the other end takes at once."""
        data = json.dumps(message, separators=(",", ":"), check_circular=False).encode()
        view = memoryview(struct.pack(">I", len(data)) + data)
        try:
            if files:
                with socket.socket(fileno=os.dup(self.fd)) as end:
                    view = view[socket.send_fds(end, [view], list(files)) :]
            while view:
                try:
                    view = view[_write(self.fd, view) :]  # a confined process may not call send
                except BlockingIOError:
                    self._wait(select.POLLOUT, deadline)
        except ConnectionError:
            raise EOFError("the other end is gone") from None

    def receive(self, deadline: float = math.inf) -> Any:
        """The next message."""
        return self._body(self._exactly(_HEAD_BYTES, deadline), deadline)

    def receive_files(self) -> tuple[Any, list[int]]:
        """The next message, and the files that came with it."""
        self._wait(select.POLLIN, math.inf)
        with socket.socket(fileno=os.dup(self.fd)) as end:
            head, files, _, _ = socket.recv_fds(end, _HEAD_BYTES, 8)
        if not head:
            raise EOFError("the other end is gone")
        return self._body(head, math.inf), files

    def quiet(self, seconds: float) -> bool:
        """Whether no message comes within `seconds`."""
        return not select.select([self.fd], [], [], seconds)[0]

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _body(self, head: bytes, deadline: float) -> Any:
        length = int(struct.unpack(">I", head)[0])
        if length > self._longest:
            raise OverflowError(f"a message of {length} bytes")
        return json.loads(self._exactly(length, deadline))

    def _exactly(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                part = _read(self.fd, min(length - len(data), 1 << 20))
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError("the other end is gone")
            data += part
        return bytes(data)

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self.fd, event)
        if self._parent >= 0:
            poll.register(self._parent, 0)  # no events asked for: only a hang-up is reported
        left = None if deadline == math.inf else max(0.0, 1000 * (deadline - time.monotonic()))
        ready = poll.poll(left)
        if not ready or any(fd == self._parent for fd, _ in ready):
            raise TimeoutError


def text_of(error: BaseException) -> str:
    """What an exception says, up to 500 characters; its own `__str__` may raise."""
    try:
        return str(error)[:500]
    except BaseException:
        return "an exception that cannot be printed"


def words(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {text_of(error)}".split())[:300]
