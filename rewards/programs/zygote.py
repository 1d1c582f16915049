"""The process that programs are forked from: its memory never held a test.

A fork inherits its parent's memory. The worker's holds the tests and their expected outputs, so the worker
does not fork programs itself: when it is loaded, before any task, it forks this process, which receives
nothing but programs, with their input and output as open files. A program that searches its own memory finds
Python, and itself.
"""

import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from rewards import wire
from rewards.programs import hook, isolate
from rewards.programs.judging import serve
from rewards.programs.judging.remote import words

LINK_FD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one run of a program."""

    timeout_s: float  # wall clock, seconds; CPU time is limited to a second more
    memory_bytes: int = 1 << 30  # address space, the interpreter's own (about 100 MB) included
    output_bytes: int = 8 << 20  # what it may print
    file_bytes: int = 16 << 20  # the largest file it may write
    processes: int = 4096  # and threads of this user; the kernel exempts root, seccomp and the hook do not


class Zygote:
    """The worker's handle on it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            _serve_forks(theirs)
        theirs.close()
        self._socket = ours

    def start(self, code: str, kind: str, limits: Limits, fds: list[int]) -> int:
        """Start a program with `fds` as its input, output, error output; its process id.

        `kind` is `stdio`, a script, or `asserts`, which answers the judge at a fourth descriptor, a socket.
        """
        return int(self._ask({"code": code, "kind": kind, "limits": asdict(limits)}, fds)["pid"])

    def end(self) -> int:
        """Kill the program with all its processes and delete its files; its status as waitpid gives it."""
        return int(self._ask({"end": True}, [])["status"])

    def _ask(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        _send(self._socket, message, fds)
        reply, _ = _receive(self._socket)
        if "errno" in reply:
            raise OSError(reply["errno"], f"starting a program: {os.strerror(reply['errno'])}")
        return reply


def _send(channel: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    data = wire.frame(message)
    sent = socket.send_fds(channel, [data], fds)
    channel.sendall(data[sent:])


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, fds, _, _ = socket.recv_fds(channel, wire.HEAD_BYTES, 8)
    length = wire.length_of(head + wire.exactly(channel.recv, wire.HEAD_BYTES - len(head)))
    return json.loads(wire.exactly(channel.recv, length)), fds


def _serve_forks(channel: socket.socket) -> NoReturn:
    """In the zygote: start and end programs, one at a time, until the worker is gone."""
    try:
        isolate.die_with_parent()
        isolate.reap_orphans()
        fd = channel.fileno()
        os.closerange(0, fd)
        os.closerange(fd + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for low in (0, 1, 2):
            if low != fd:
                os.open(os.devnull, os.O_RDWR)
        program, folder = 0, ""
        while True:
            message, fds = _receive(channel)
            try:
                if "end" in message:
                    _send(channel, {"status": _end(program)}, [])
                    _drop(folder)
                    program = 0
                else:
                    folder = isolate.fresh_scratch() or tempfile.mkdtemp(prefix="program-")
                    program = _fork(message, fds, folder)
                    _send(channel, {"pid": program}, [])
            except OSError as error:
                _send(channel, {"errno": error.errno or 1}, [])
            for given in fds:
                os.close(given)
    finally:
        os._exit(0)


def _drop(folder: str) -> None:
    if isolate.active.namespaces:
        isolate.drop_scratch()
        return
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):  # folders without permissions, or nested too deep for Python
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _end(pid: int) -> int:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    if isolate.active.namespaces:  # the first process of a namespace takes the others with it
        return os.waitpid(pid, 0)[1]
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    while orphans := _children():
        for orphan in orphans:
            with suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            with suppress(ChildProcessError):
                os.waitpid(orphan, 0)
    return status


def _children() -> list[int]:
    """This process's children (Linux; elsewhere none are found)."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listing:
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return []


def _fork(message: dict[str, Any], fds: list[int], folder: str) -> int:
    pid = isolate.fork_program()
    if pid:
        return pid
    try:
        limits = Limits(**message["limits"])
        isolate.die_with_parent()
        os.setsid()
        keep(fds)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(PATH=os.defpath, HOME=folder, TMPDIR=folder, LANG="C.UTF-8")
        tempfile.tempdir = folder
        sys.argv, sys.path = ["program.py"], [p for p in sys.path if "packages" in p or "lib" in p]
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        seed()
        isolate.limit(int(limits.timeout_s) + 1, limits.memory_bytes, limits.file_bytes, limits.processes)
        isolate.give_up_privileges()
        hook.forbid(folder)
        if message["kind"] == "stdio":
            _script(message["code"])
        else:
            serve.serve(LINK_FD, message["code"])
    finally:
        os._exit(70)


def keep(wanted: list[int]) -> None:
    """Make `wanted` the descriptors 0, 1, 2, … and close all others."""
    # Above the final numbers first, so that no dup2 overwrites a descriptor still to be moved.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 32) for fd in wanted]
    for target, source in enumerate(high):
        os.dup2(source, target)
    os.closerange(len(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[0])


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
    with suppress(BaseException):
        sys.stdout.flush()
    with suppress(BaseException):
        out.flush()
    leave(status & 0xFF if isinstance(status, int) else 1)
