"""What Python itself refuses to a program under test: the layer that works on every system.

An audit hook sees what Python's functions do, and cannot be removed. Native code bypasses it, so ctypes is
refused too; native code of other modules, and a program that changes the hook itself by way of the traceback
of its refusal, are for the kernel to confine (`isolate`).
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from rewards.programs.isolate import python_folders

_REFUSED = frozenset(
    "os.fork os.forkpty os.exec os.posix_spawn os.spawn os.system subprocess.Popen pty.spawn os.kill "  # noqa: SIM905
    "os.killpg signal.pthread_kill os.setxattr os.removexattr gc.get_objects gc.get_referrers".split()
)
_FAMILIES = ("socket.", "ctypes.")
_CHANGES = frozenset(
    "os.remove os.rename os.rmdir os.mkdir os.chmod os.chown os.link os.symlink os.truncate os.utime "  # noqa: SIM905
    "os.chflags os.mkfifo os.mknod shutil.rmtree shutil.move shutil.copyfile shutil.copytree".split()
)
_WITH_MODE = ("os.chmod", "os.mkdir", "os.chown", "os.truncate", "os.utime")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def forbid(folder: str | None) -> None:
    """Refuse permanently what a solution never needs: processes, the network, ctypes, files elsewhere.

    It may read Python's own files, and read and write in `folder`, where there is one.
    """
    sys.addaudithook(rule(folder))


@cache
def rule(folder: str | None) -> Callable[[str, tuple[Any, ...]], None]:
    """The hook of `forbid`, which a parent prepares for its forks."""
    home = os.path.realpath(folder) if folder else "\0"
    inside = home + os.sep
    realpath, fspath, fsdecode = os.path.realpath, os.fspath, os.fsdecode
    seen = (inside, *(root + "/" for root in python_folders()))
    seen_files = (os.devnull, "/dev/zero", "/dev/urandom", *python_folders())

    def within(
        path: Any, folders: tuple[str, ...] = (inside,), files: tuple[str, ...] = (os.devnull,)
    ) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a descriptor that is already open, or a flag
        real = realpath(fsdecode(fspath(path)))
        return real == home or real in files or real.startswith(folders)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            writing = (args[2] or 0) & _WRITING
            allowed = within(args[0]) if writing else within(args[0], seen, seen_files)
        elif event in _CHANGES:
            # A name relative to an open folder's descriptor (the last argument) could lie anywhere.
            by_folder = isinstance(args[-1], int) and args[-1] >= 0 and len(args) > 1
            relative = by_folder and event.startswith("os.")
            allowed = all(within(arg) for arg in args[:2]) and (event in _WITH_MODE or not relative)
        else:
            allowed = event not in _REFUSED and not event.startswith(_FAMILIES)
        if not allowed:
            raise PermissionError(f"{event} is not allowed in a program under test")

    return hook
