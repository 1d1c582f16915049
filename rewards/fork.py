"""A fork of a worker that answers over a channel, and folders that a program leaves.

The zygote and the judge are such forks: what they inherit warm takes long to import, and a fork of it a few
milliseconds.
"""

import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from rewards.wire import Channel

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class Fork:
    """A child that runs `serve` on its end of a channel and ends; of the open files it keeps `files`."""

    def __init__(self, serve: Callable[[Channel], None], files: Sequence[int] = (), parent: int = -1) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                keep_open(theirs.fileno(), *files)
                serve(Channel(theirs))
            finally:
                os._exit(0)
        theirs.close()
        self.channel = Channel(ours, parent)

    def end(self) -> float:
        """Kill it; the CPU seconds that it used."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        usage = os.wait4(self.pid, 0)[2]
        self.channel.end.close()
        return usage.ru_utime + usage.ru_stime


def keep_open(*files: int) -> None:
    """Close every descriptor but these; 0, 1 and 2 are the null device unless among them."""
    low = 0
    for fd in sorted(files):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, max(low, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    for _ in {0, 1, 2} - set(files):  # the lowest that is free, each time
        os.open(os.devnull, os.O_RDWR)


def remove(folder: str) -> None:
    """Delete a folder, however deep and whatever its permissions; never raises (`shutil.rmtree` recurses)."""
    for _ in range(50):  # what still writes there is being killed
        try:
            os.chmod(folder, 0o700)
            _empty(os.open(folder, _FOLDER))
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)


def _empty(at: int) -> None:
    """Delete all that is in the folder open at `at`, one folder after the other, and close it."""
    inside: list[str] = []
    try:
        while True:
            inner = ""
            with os.scandir(at) as entries:
                for entry in entries:
                    try:
                        os.unlink(entry.name, dir_fd=at)
                    except (IsADirectoryError, PermissionError):  # of a folder, by system
                        inner = entry.name
                        break
            if inner:
                os.chmod(inner, 0o700, dir_fd=at)
                inside.append(inner)
            elif not inside:
                return
            above, at = at, os.open(inner or "..", _FOLDER, dir_fd=at)
            os.close(above)
            if not inner:
                os.rmdir(inside.pop(), dir_fd=at)
    finally:
        os.close(at)


def outgrown(folder: str, most: int) -> bool:
    """Whether a folder holds more than `most` bytes, 16 KiB an entry included, or is too deep to search."""
    size, folders = 0, [folder]
    while folders and size <= most:
        with suppress(FileNotFoundError, PermissionError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                size += entry.stat(follow_symlinks=False).st_blocks * 512 + (16 << 10)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    size += most * (len(entry.path) > 2000)
    return size > most
