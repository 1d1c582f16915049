"""What Python itself refuses to a program under test, a second line behind the kernel's (`isolate`).

An audit hook sees what Python's functions do, and cannot be removed. Native code bypasses it, so ctypes is
refused too; native code of other modules, and a program that changes the hook itself by way of the traceback
of its refusal, are for the kernel to confine.
"""

import os
import sys
from typing import Any

from rewards.programs.isolate import python_folders

_REFUSED = frozenset(
    "os.fork os.forkpty os.exec os.posix_spawn os.spawn os.system subprocess.Popen pty.spawn os.kill "  # noqa: SIM905
    "os.killpg signal.pthread_kill os.setxattr os.removexattr gc.get_objects gc.get_referrers".split()
)
_FAMILIES = ("socket.", "ctypes.")
_CHANGES = frozenset(
    "os.remove os.rename os.rmdir os.mkdir os.chmod os.chown os.link os.symlink os.truncate os.utime "  # noqa: SIM905
    "os.mkfifo os.mknod shutil.rmtree shutil.move shutil.copyfile shutil.copytree".split()
)
_WITH_MODE = ("os.chmod", "os.mkdir", "os.chown", "os.truncate", "os.utime")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def forbid(folder: str | None) -> None:
    """Refuse permanently what a solution never needs: processes, the network, ctypes, files elsewhere.

    It may read Python's own files, and read and write in `folder`, where there is one."""
    realpath, fspath, fsdecode = os.path.realpath, os.fspath, os.fsdecode
    writable = (realpath(folder), os.devnull) if folder else (os.devnull,)
    readable = (*writable, *python_folders(), "/dev/zero", "/dev/urandom")

    def within(path: Any, places: tuple[str, ...]) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a descriptor that is already open, or a flag
        real = realpath(fsdecode(fspath(path)))
        return real in places or real.startswith(tuple(place + "/" for place in places))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            allowed = within(args[0], writable if (args[2] or 0) & _WRITING else readable)
        elif event in _CHANGES:
            # A name relative to an open folder's descriptor (the last argument) could lie anywhere.
            relative = isinstance(args[-1], int) and args[-1] >= 0 and event not in _WITH_MODE
            allowed = all(within(arg, writable) for arg in args[:2]) and not relative
        else:
            allowed = event not in _REFUSED and not event.startswith(_FAMILIES)
        if not allowed:
            raise PermissionError(f"{event} is not allowed in a program under test")

    sys.addaudithook(hook)
