"""A fork of a worker that answers over a channel, and folders that a program leaves.

The solver of mathematics, the zygote and the judge are such forks: what they inherit warm takes half a second
to import, and a fork of it a few milliseconds.
"""

import os
import resource
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from rewards.wire import Channel


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

    def end(self) -> tuple[int, float]:
        """Kill it; its status as waitpid gives it, and the CPU seconds that it used."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        self.channel.end.close()
        return status, usage.ru_utime + usage.ru_stime


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
    """Delete a folder, however deep and whatever its permissions; never raises.

    `shutil.rmtree` recurses, and fails at a thousand nested folders. Here the content of each inner folder
    moves up, so that paths stay short.
    """
    for _ in range(100):  # what still writes there is being killed
        try:
            os.chmod(folder, 0o700)
            while names := os.listdir(folder):
                for path in (os.path.join(folder, name) for name in names):
                    if os.path.islink(path) or not os.path.isdir(path):
                        os.unlink(path)
                        continue
                    os.chmod(path, 0o700)
                    for inner in (os.path.join(path, name) for name in os.listdir(path)):
                        if os.path.isdir(inner) and not os.path.islink(inner):
                            os.chmod(inner, 0o700)  # to move a folder is to change its own ".."
                        os.rename(inner, os.path.join(folder, secrets.token_hex(8)))
                    os.rmdir(path)
            os.rmdir(folder)
        except FileNotFoundError:
            if not os.path.lexists(folder):
                return
        except OSError:
            time.sleep(0.02)


def outgrown(folder: str, most: int) -> bool:
    """Whether a folder holds more than `most` bytes, or is too deep to be looked through."""
    size, folders = 0, [folder]
    while folders and size <= most:
        with suppress(FileNotFoundError, PermissionError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    size += most * (len(entry.path) > 2000)
    return size > most
