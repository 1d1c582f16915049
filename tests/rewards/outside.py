"""`python -m tests.rewards.outside JSON`: run the hostile programs as some user with some layers taken away.

Prints one JSON object: `active` layers, the number of `programs`, `faults` by program: what it read, changed
or left outside its sandbox.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import shutil
import socket
import sqlite3
import stat
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

from rewards import pool as pool_module
from rewards.pool import WorkerPool
from rewards.programs import seccomp
from rewards.programs.grade import active_sandbox, run_tests
from tests.rewards.hostile import SECRET, programs

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
UNSHARE, LANDLOCK, PRCTL = (272, 97), (444, 444), (157, 167)
WRITTEN = [Path(folder, "r1-written") for folder in ("/tmp", "/var/tmp", "/dev/shm")]
libc = ctypes.CDLL(None, use_errno=True)


def become_nobody() -> None:
    """A plain user; folders above Python's that it may not pass are replaced, for this process alone."""
    needed = {Path(sys.prefix), Path(sys.base_prefix).resolve(), ROOT}
    closed = {up for path in needed for up in path.parents if not up.stat().st_mode & stat.S_IXOTH}
    if closed:
        assert libc.unshare(0x20000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0
    for up in closed:
        inner = {path: os.open(path, os.O_PATH) for path in needed if path.is_relative_to(up)}
        assert libc.mount(b"none", bytes(up), b"tmpfs", 0, b"mode=0755") == 0
        for path, fd in inner.items():
            path.mkdir(parents=True)
            assert libc.mount(f"/proc/self/fd/{fd}".encode(), bytes(path), None, 0x5000, None) == 0
            os.close(fd)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def take_away(layers: list[str], folder: Path) -> None:
    """From this process's children, as a container does: by a filter; the audit hook by another worker."""
    arch = seccomp.machine[0]
    load, equal, give = 0x20, 0x15, 0x06
    refuse, absent, invalid = 0x00050001, 0x00050026, 0x00050016
    program = [(load, 0, 0, 0)]
    if "namespaces" in layers:
        program += [(equal, 0, 1, UNSHARE[arch]), (give, 0, 0, refuse)]
    if "Landlock" in layers:
        program += [(equal, 0, 1, LANDLOCK[arch]), (give, 0, 0, absent)]
    if "seccomp" in layers:
        program += [(equal, 0, 4, PRCTL[arch]), (load, 0, 0, 16), (equal, 0, 1, seccomp.PR_SET_SECCOMP)]
        program += [(give, 0, 0, invalid), (give, 0, 0, 0x7FFF0000)]
    if len(program) > 1:
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        seccomp.install(b"".join(struct.pack("HBBI", *each) for each in program))
    if "audit hook" in layers:
        script = folder / "worker"
        script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.argv[1:] = sys.argv[4:]\n"
            "from rewards.programs import hook\nhook.forbid = lambda folder: None\n"
            "from rewards import worker\nsys.exit(worker.main())\n"
        )
        script.chmod(0o755)
        pool_module.sys.executable = str(script)


def lay_out(base: Path) -> dict[str, str]:
    """Everything outside that a program may want, open to everybody; what the programs' text names."""
    outside = base / "outside"
    (outside / "empty").mkdir(parents=True)
    for name, text in {"secret": SECRET, "target": "as it was", "secretmodule.py": f"x = {SECRET!r}"}.items():
        (outside / name).write_text(text)
    with zipfile.ZipFile(outside / "secret.zip", "w") as archive:
        archive.write(outside / "secretmodule.py", "secretmodule.py")
    with contextlib.closing(sqlite3.connect(outside / "secret.db")) as table:
        table.execute("create table t (x)")
        table.execute("insert into t values (?)", [SECRET])
        table.commit()
    (base / "tmp").mkdir()
    for path in (base, *base.rglob("*")):
        path.chmod(0o777)
    shm = libc.shmget(0, 4096, 0o1666)
    libc.shmat.restype = ctypes.c_void_p
    at = libc.shmat(shm, None, 0)
    ctypes.memmove(at, SECRET.encode(), len(SECRET))
    libc.shmctl(shm, 0, None)  # gone with this process
    named = Path("/dev/shm", f"r1-hostile-{os.getpid()}")
    named.write_text(SECRET)
    named.chmod(0o666)
    return {
        "secret": str(outside / "secret"),
        "target": str(outside / "target"),
        "dir": str(outside),
        "shm": str(shm),
        "shmname": named.name,
        "pid": str(os.getpid()),
        "path": str(base / "socket"),
        "abstract": f"r1-hostile-{os.getpid()}",
    }


def state(base: Path) -> dict[str, Any]:
    """What a program could have changed outside; times of reading left out."""
    out: dict[str, Any] = {"written": [str(path) for path in WRITTEN if path.exists()]}
    for path in sorted({*base.rglob("*")} - {base / "tmp"}):
        s = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        out[str(path)] = (s.st_mode, s.st_uid, s.st_gid, s.st_mtime_ns, content)
    for path in (Path(os.__file__), Path(contextlib.__file__).with_name("string.py")):
        out[str(path)] = (path.stat().st_mode, path.stat().st_ctime_ns)
    out["ipc"] = [libc.shmget(0x7231, 0, 0), libc.semget(0x7231, 0, 0), libc.msgget(0x7231, 0)]
    out["process"] = [os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0), os.uname().nodename]
    return out


def restore(before: dict[str, Any]) -> None:
    """Undo what a program did to the files outside, so that the next finds them."""
    for path, was in before.items():
        if isinstance(was, tuple) and stat.S_ISREG(was[0]) and "r1-outside" in path:
            Path(path).unlink(missing_ok=True)
            Path(path).write_bytes(was[-1])
            os.chmod(path, was[0] & 0o7777)
            os.utime(path, ns=(was[3], was[3]))


def living() -> bool:
    """Whether a process that was started here, or by a program, is still there."""
    with contextlib.suppress(ChildProcessError):
        for _ in range(100):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.02)
        return True
    return False


def main(plan: dict[str, Any]) -> dict[str, Any]:
    """Run them all in one worker."""
    base = Path(tempfile.mkdtemp(prefix="r1-outside-", dir="/dev/shm"))
    fill = lay_out(base)
    os.environ["SECRET"] = SECRET
    tempfile.tempdir = str(base / "tmp")
    libc.prctl(36, 1, 0, 0, 0)  # orphans become children of this process
    listeners = [socket.create_server(("127.0.0.1", 0))]
    for name in (fill["path"], "\0" + fill["abstract"]):
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(name)
        listeners[-1].listen()
    os.chmod(fill["path"], 0o777)
    fill["port"] = str(listeners[0].getsockname()[1])
    if plan["native"]:
        code = zlib.compress(Path(plan["native"]).read_bytes())
        fill["native"] = base64.b64encode(code).decode()
    take_away([layer for layer in plan["without"] if layer == "audit hook"], base)
    if plan["user"] == "nobody":
        become_nobody()
    take_away([layer for layer in plan["without"] if layer != "audit hook"], base)
    faults: dict[str, str] = {}
    before = state(base)
    tests = [f"assert f() == {SECRET!r}"]
    with WorkerPool(1, allow_unsafe_code=True) as pool:
        active, pids = active_sandbox(pool), pool.pids()
        texts = {name: text for name, text in programs(fill).items() if name.startswith(plan.get("only", ""))}
        for name, text in texts.items():
            outcome = run_tests(text, tests, timeout_s=2, pool=pool)
            after = state(base)
            if outcome.value != 0:
                faults[name] = f"value {outcome.value}: {outcome.detail}"
            elif after != before:
                faults[name] = str([key for key in {**after, **before} if after.get(key) != before.get(key)])
            elif pool.pids() != pids:
                faults[name] = "the worker was replaced"
            if after != before:
                restore(before)
            pids = pool.pids()
    for listener in listeners:
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            listener.accept()
            faults[f"listener {listener.getsockname()}"] = "a program connected"
    if living():
        faults["processes"] = "left running"
    if left := os.listdir(base / "tmp"):
        faults["left in TMPDIR"] = str(left)
    return {"active": active, "programs": len(texts), "faults": faults, "base": str(base)}


def clean_up(base: str) -> None:
    """Delete what `lay_out` made."""
    shutil.rmtree(base, ignore_errors=True)
    for path in Path("/dev/shm").glob("r1-hostile-*"):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
