"""Kernel measures against an untrusted program, and which of them are active here.

In order of strength, each used where the machine has it:

  namespaces  user, mount, network, IPC, host name, and a process-id namespace for each program: it sees
              Python's own folders, read-only, and an empty scratch folder in memory; no /proc, no network, no
              other process. (As bubblewrap does it, by the same system calls: starting bubblewrap
              for each program would cost more than the program's fork.)
  Landlock    it reads Python's own folders and writes its scratch folder alone (`landlock`).
  seccomp     new processes, sockets, signals to others, ptrace, mounts and the like fail with EPERM.
  rlimits     CPU, address space, file size, processes, core dumps. Always.
  audit hook  writing or reading outside, processes, sockets, ctypes fail in Python itself. Always.

The judge gets the last four, no scratch folder. Linux on x86-64 and aarch64; elsewhere the last two remain.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from functools import cache
from pathlib import Path

from rewards.fork import remove
from rewards.programs import landlock, seccomp
from rewards.programs.seccomp import checked, libc, machine, prctl

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SCRATCH = "/scratch/program"
STACK_BYTES = 64 << 20  # deep recursion is a legitimate way to write a solution
_SYSCALL_PIVOT_ROOT, _SYSCALL_MOUNT_SETATTR = (155, 41), 442

_libc_with_gil = ctypes.PyDLL(None, use_errno=True)
_no_namespaces = "not tried"  # why there are none, or ""; `enter` finds out


def describe() -> str:
    """The measures that confine a program of this process, in words."""
    parts = [] if _no_namespaces else ["namespaces (user, mount, pid, network, ipc)"]
    parts += [f"Landlock (version {landlock.version()})"] if landlock.version() else []
    parts += ["seccomp"] if seccomp.available() else []
    missing = f"; no namespaces: {_no_namespaces}" if _no_namespaces else ""
    return ", ".join([*parts, "rlimits", "audit hook"]) + missing


def gap() -> str:
    """Why programs are not confined here, or "": seccomp, and namespaces or Landlock for files, it takes."""
    missing = [] if seccomp.available() else ["seccomp"]
    if _no_namespaces and not landlock.version():
        missing.append(f"namespaces ({_no_namespaces}) and Landlock (Linux 5.13 and later)")
    return "this machine has no " + ", no ".join(missing) if missing else ""


def enter() -> None:
    """Move this process, single-threaded, into namespaces where only Python's folders are left, read-only.

    Where that is not possible the process stays as it was, and `describe` tells why."""
    global _no_namespaces
    if machine is None:
        _no_namespaces = f"not supported on {platform.system()} {platform.machine()}"
        return
    python_folders()  # before the folders above them are out of sight
    # Tried in a child first: half a move could not be undone.
    probe = os.fork()
    if probe == 0:
        try:
            _enter()
            os._exit(0)
        except OSError as error:
            os._exit(min(error.errno or 1, 255))
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(probe, 0)[1])
    _no_namespaces = os.strerror(status) if status else ""
    if not status:
        _enter()


def _mount(source: str, target: str, kind: str | None, flags: int, options: bytes | None = None) -> None:
    fs = kind.encode() if kind else None
    checked(libc.mount(os.fsencode(source), os.fsencode(target), fs, ctypes.c_ulong(flags), options))


def _enter() -> None:
    assert machine is not None
    uid, gid = os.geteuid(), os.getegid()
    checked(libc.unshare(NEWUSER | NEWNS | NEWNET | NEWIPC | NEWUTS))
    prctl(PR_SET_DUMPABLE, 1)  # the files below are root's otherwise
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    hide_memory()
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    root = "/proc"  # a folder that every system has, and that nothing below needs once it is covered
    _mount("root", root, "tmpfs", MS_NOSUID | MS_NODEV, b"size=1048576,mode=0755")
    for path in python_folders():
        _bind(path, root)
    for device in ("null", "zero", "urandom"):
        _bind(f"/dev/{device}", root, read_only=False)
    os.makedirs(root + SCRATCH)
    os.mkdir(root + "/.old")
    os.chdir(root)
    checked(libc.syscall(_SYSCALL_PIVOT_ROOT[machine[0]], b".", b".old"))
    os.chdir("/")
    checked(libc.umount2(b"/.old", MNT_DETACH))
    os.rmdir("/.old")
    _mount("root", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


@cache
def python_folders() -> tuple[str, ...]:
    """The folders that Python needs, without those that lie in others of them."""
    project = Path(__file__).resolve().parents[2]
    needed = [sys.base_prefix, sys.prefix, sys.base_exec_prefix, os.path.dirname(os.__file__)]
    needed += ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/localtime"]
    needed += ["/etc/ld.so.cache", str(project / "rewards"), str(project / "rollout")]
    needed += [path for path in sys.path if path.endswith("-packages")]  # a user's own lie elsewhere
    needed = [path for path in needed if os.path.exists(path)]
    # A symbolic link needs its target too: /lib is usr/lib on most systems.
    paths = {*needed, *map(os.path.realpath, needed)} - {"/"}
    return tuple(sorted(path for path in paths if paths.isdisjoint(map(str, Path(path).parents))))


def _bind(path: str, root: str, *, read_only: bool = True) -> None:
    target, folder = root + path, os.path.isdir(path)
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder:
        Path(target).touch()
    _mount(path, target, None, MS_BIND | MS_REC)
    if not read_only:
        return
    recursive, at_cwd = 0x8000, -100
    # MOUNT_ATTR_* have the values of MS_*.
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    done = libc.syscall(
        _SYSCALL_MOUNT_SETATTR, at_cwd, os.fsencode(target), recursive, attributes, len(attributes)
    )
    if done < 0:  # Linux < 5.12: the top mount alone; what it had must be repeated
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048 | 4096)
        _mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def fork_program() -> int:
    """`os.fork`, the child in a process-id namespace of its own where namespaces are active."""
    if _no_namespaces:
        return os.fork()
    assert machine is not None
    ctypes.pythonapi.PyOS_BeforeFork()
    flags = ctypes.c_long(NEWPID | signal.SIGCHLD)
    pid = int(_libc_with_gil.syscall(seccomp.CLONE[machine[0]], flags, 0, 0, 0, 0))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    ctypes.set_errno(number)
    return checked(pid)


def fresh_scratch(folder: str) -> str:
    """An empty folder for one program: in memory, and `folder` on disk only where there are no namespaces."""
    if _no_namespaces:
        os.mkdir(folder, 0o700)
        return folder
    _mount("scratch", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, b"size=67108864,nr_inodes=4096,mode=0700")
    return SCRATCH


def drop_scratch(folder: str) -> None:
    """Delete what `fresh_scratch` made."""
    if folder != SCRATCH:
        remove(folder)
        return
    libc.umount2(os.fsencode(SCRATCH), MNT_DETACH)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that made it ends."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hide_memory() -> None:
    """No other process of this user may read this one's memory."""
    prctl(PR_SET_DUMPABLE, 0)


def limit(cpu_s: int, memory_bytes: int, file_bytes: int, processes: int) -> None:
    """Set the resource limits; hard ones too but the stack's, so that they cannot be raised again."""
    for what, bound in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, STACK_BYTES),
    ):
        hard = resource.getrlimit(what)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (bound, hard if what == resource.RLIMIT_STACK else bound))


def obey_file_rules(scratch: str | None) -> None:
    """Keep this process, and its forks, to reading what Python needs and writing in `scratch` (Landlock)."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    landlock.enforce(python_folders(), scratch)


def confine() -> None:
    """Keep this process to harmless system calls, without root's capabilities."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if machine is not None:
        header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        libc.capset(header, bytes(24))
        if seccomp.available():
            seccomp.filter_calls()
