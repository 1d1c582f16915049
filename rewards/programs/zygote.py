"""The process that programs are forked from: its memory never held a test.

A fork inherits its parent's memory. The worker's holds the tests and their expected outputs, so the worker
does not fork programs itself: when it is loaded, before any task, it forks this process, which receives
nothing but programs, with their input and output as open files. A program that searches its own memory finds
Python, and itself.
"""

import errno
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rewards.fork import Fork, keep, outgrown
from rewards.programs import hook, isolate
from rewards.programs.judging import serve
from rewards.wire import Channel, words

LINK_FD = 3
SCRATCH_BYTES = 64 << 20  # of the folder that a program may fill
WATCH_S = 0.2  # seconds between looks at one on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one run of a program."""

    timeout_s: float  # wall clock, seconds; CPU time is limited to a second more
    memory_bytes: int = 1 << 30  # address space, the interpreter's own (about 100 MB) included
    output_bytes: int = 8 << 20  # what it may print
    file_bytes: int = 16 << 20  # the largest file it may write
    processes: int = 4096  # and threads of this user; the kernel exempts root, seccomp and the hook do not


class Zygote:
    """The worker's handle on it. `scratch` is a folder for programs to be made where they need one on disk.

    EOFError from any method: the zygote is gone, and no other can be made, since the worker has seen tests.
    """

    def __init__(self, scratch: str) -> None:
        self._channel = Fork(partial(_serve_forks, scratch)).channel

    def start(self, code: str, kind: str, limits: Limits, fds: list[int]) -> int:
        """Start a program with `fds` as its input, output, error output; its process id.

        `kind` is `stdio`, a script, or `asserts`, which answers the judge at a fourth descriptor, a socket.
        """
        return int(self._ask({"code": code, "kind": kind, "limits": asdict(limits)}, fds)["pid"])

    def end(self) -> int:
        """Kill the program with all its processes and delete its files; its status as waitpid gives it.

        OSError: it was not even confined, so that nothing of it ran."""
        return int(self._ask({"end": True})["status"])

    def _ask(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        self._channel.send(message, files=fds)
        reply: dict[str, Any] = self._channel.receive()
        if "errno" in reply:
            raise OSError(reply["errno"], f"starting a program: {os.strerror(reply['errno'])}")
        return reply


def _serve_forks(scratch: str, channel: Channel) -> None:
    """In the zygote: start and end programs, one at a time, until the worker is gone; leave nothing then."""
    program, folder, ready = 0, "", -1
    try:
        while True:
            while folder == scratch and channel.quiet(WATCH_S):  # a folder on disk has no size of its own
                if outgrown(folder, SCRATCH_BYTES):
                    os.kill(program, signal.SIGKILL)
            message, files = channel.receive_files()
            try:
                if "end" in message:
                    status, program = _end(program), 0
                    isolate.drop_scratch(folder)
                    folder, confined = "", os.read(ready, 1)
                    os.close(ready)
                    channel.send({"status": status} if confined else {"errno": errno.ECHILD})
                else:
                    folder = isolate.fresh_scratch(scratch)
                    program, ready = _fork(message, files, folder)
                    channel.send({"pid": program})
            except OSError as error:
                channel.send({"errno": error.errno or 1})
            for given in files:
                os.close(given)
    finally:
        if program:
            _end(program)
        if folder:
            isolate.drop_scratch(folder)


def _end(pid: int) -> int:
    """Kill a program; those of its namespace go with it, and without one it could make no other."""
    for kill in (os.kill, os.killpg):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _fork(message: dict[str, Any], fds: list[int], folder: str) -> tuple[int, int]:
    """The program's process id, and a pipe from which a byte can be read once it is confined."""
    ready_in, ready_out = os.pipe()
    if pid := isolate.fork_program():
        os.close(ready_out)
        return pid, ready_in
    try:
        limits = Limits(**message["limits"])
        isolate.die_with_parent()
        os.setsid()
        keep([*fds, ready_out])
        ready_out = len(fds)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(PATH=os.defpath, HOME=folder, TMPDIR=folder, LANG="C.UTF-8")
        tempfile.tempdir = folder
        sys.argv, sys.path = ["program.py"], [p for p in sys.path if "packages" in p or "lib" in p]
        seed()
        isolate.limit(int(limits.timeout_s) + 1, limits.memory_bytes, limits.file_bytes, limits.processes)
        isolate.obey_file_rules(folder)
        isolate.confine()
        hook.forbid(folder)
        os.write(ready_out, b"k")
        os.close(ready_out)
        if message["kind"] == "stdio":
            _script(message["code"])
        else:
            serve.serve(LINK_FD, message["code"])
    finally:
        os._exit(70)


def standard_streams() -> None:
    """Python's, over descriptors 0 to 2, whatever these are by then: made once, used by every fork."""
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        for fd, mode in enumerate("rww")
    )


def seed() -> None:
    """The same random numbers in every run, so that verdicts repeat."""
    if random := sys.modules.get("random"):
        random.seed(0)


def _script(code: str) -> None:
    leave, describe = os._exit, words
    out = sys.stdout
    status: Any = 0
    try:
        exec(compile(code, "program", "exec"), serve.module("__main__"))
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException as error:
        os.write(2, ("\nthe program raised " + describe(error)).encode("utf-8", "replace"))
        leave(1)
    for stream in (getattr(sys, "stdout", out), out):
        with suppress(BaseException):
            stream.flush()
    leave(status & 0xFF if isinstance(status, int) else 1)
