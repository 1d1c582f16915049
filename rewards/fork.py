"""A fork of a worker that answers over a channel, and folders that a program leaves.

The zygote and the judge are such forks: what they inherit warm takes long to import, and a fork of it a few
milliseconds.
"""

import fcntl
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
    """A child that runs `serve` on its end of a channel, and the numbers of `files` there, and ends.

    It has no other open files; its standard streams are the null device."""

    def __init__(self, serve: Callable[..., None], files: Sequence[int] = (), parent: int = -1) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                nothing = os.open(os.devnull, os.O_RDWR)
                keep([nothing, nothing, nothing, theirs.fileno(), *files])
                serve(Channel(3), *range(4, 4 + len(files)))
            finally:
                os._exit(0)
        theirs.close()
        self.channel = Channel(ours.detach(), parent)

    def end(self) -> None:
        """Kill it."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.channel.close()


def keep(files: Sequence[int]) -> None:
    """Make these the descriptors 0, 1, 2, … and close all others."""
    # Above the final numbers first, so that no dup2 overwrites a descriptor still to be moved.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 32) for fd in files]
    for target, source in enumerate(high):
        os.dup2(source, target)
    os.closerange(len(files), resource.getrlimit(resource.RLIMIT_NOFILE)[0])


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
