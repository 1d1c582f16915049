"""Kernel measures against an untrusted program, and which of them are active here.

In order of strength, each used where the machine has it:

  namespaces  user, mount, network, IPC, host name, and a process-id namespace for each program: it sees
              Python's own folders, read-only, and an empty scratch folder in memory; no /proc, no network, no
              other process. (As bubblewrap does it, by the same system calls: starting bubblewrap
              for each program would cost more than the program's fork.)
  seccomp     new processes, sockets, signals to others, ptrace, mounts and the like fail with EPERM.
  rlimits     CPU, address space, file size, processes, core dumps. Always.
  audit hook  writing or reading outside, processes, sockets, ctypes fail in Python itself. Always.

Linux on x86-64 and aarch64; elsewhere the last two remain, and `describe` reports it.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SCRATCH = "/scratch"
STACK_BYTES = 64 << 20  # deep recursion is a legitimate way to write a solution

# Refused to programs, by kernel name: x86-64's number, aarch64's number.
_DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),  # noqa: E501
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),  # noqa: E501
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "tkill": (200, 130),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),  # noqa: E501
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "mount_setattr": (442, 442), "mknod": (133, -1), "mknodat": (259, 33), "bpf": (321, 280),
    "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "init_module": (175, 105), "finit_module": (313, 273), "reboot": (169, 142),  # noqa: E501
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),  # noqa: E501
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "setsid": (112, 157), "setpgid": (109, 154),
}  # fmt: skip
_CLONE, _CLONE3, _KILL, _TGKILL = (56, 220), (435, 435), (62, 129), (234, 131)
_SYSCALL_PIVOT_ROOT, _SYSCALL_MOUNT_SETATTR = (155, 41), 442
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE_THREAD = 0x00010000

_linux = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True) if _linux else None
_libc_with_gil = ctypes.PyDLL(None, use_errno=True) if _linux else None
_machine = _ARCHITECTURES.get(platform.machine()) if _linux else None


@dataclass
class _Active:
    """What `enter` found to work in this process."""

    namespaces: bool = False
    seccomp: bool = False
    why_not: str = ""


active = _Active()


def describe() -> str:
    """The measures that confine a program of this process, in words."""
    parts = ["namespaces (user, mount, pid, network, ipc)"] if active.namespaces else []
    parts += ["seccomp"] if active.seccomp else []
    missing = f"; no namespaces: {active.why_not}" if not active.namespaces else ""
    return ", ".join([*parts, "rlimits", "audit hook"]) + missing


def enter(project: Path) -> None:
    """Move this process, single-threaded, into namespaces where only Python's folders are left, read-only.

    Where that is not possible the process stays as it was, and `describe` tells why.
    """
    if _libc is None or _machine is None:
        active.why_not = f"not supported on {platform.system()} {platform.machine()}"
        return
    # A filter at address 0: a kernel that has filters returns EFAULT, one without EINVAL.
    active.seccomp = _libc.prctl(PR_SET_SECCOMP, 2, 0, 0, 0) < 0 and ctypes.get_errno() == 14
    # Tried in a child first: half a move could not be undone.
    probe = os.fork()
    if probe == 0:
        try:
            _enter(project)
            os._exit(0)
        except OSError as error:
            os._exit(min(error.errno or 1, 255))
        finally:
            os._exit(1)
    _, status = os.waitpid(probe, 0)
    if status:
        active.why_not = os.strerror(os.waitstatus_to_exitcode(status))
        return
    _enter(project)
    active.namespaces = True


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _mount(source: str, target: str, kind: str | None, flags: int, options: bytes | None = None) -> None:
    assert _libc is not None
    fs = kind.encode() if kind else None
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), fs, ctypes.c_ulong(flags), options))


def _enter(project: Path) -> None:
    assert _libc is not None and _machine is not None
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(NEWUSER | NEWNS | NEWNET | NEWIPC | NEWUTS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    root = os.environ["TMPDIR"]  # the worker's own empty folder
    _mount("root", root, "tmpfs", MS_NOSUID | MS_NODEV, b"size=1048576,mode=0755")
    for path in _visible(project):
        _bind(path, root)
    for device in ("null", "zero", "urandom"):
        _bind(f"/dev/{device}", root, read_only=False)
    os.mkdir(root + SCRATCH)
    os.mkdir(root + "/.old")
    os.chdir(root)
    _check(_libc.syscall(_SYSCALL_PIVOT_ROOT[_machine[0]], b".", b".old"))
    os.chdir("/")
    _check(_libc.umount2(b"/.old", MNT_DETACH))
    os.rmdir("/.old")
    _mount("root", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _visible(project: Path) -> list[str]:
    """The folders that Python needs, without those that lie in others of them."""
    needed = [sys.base_prefix, sys.prefix, sys.base_exec_prefix, os.path.dirname(os.__file__)]
    needed += ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/localtime"]
    needed += ["/etc/ld.so.cache", str(project / "rewards"), str(project / "rollout")]
    needed = [path for path in needed if os.path.exists(path)]
    # A symbolic link needs its target too: /lib is usr/lib on most systems.
    paths = {*needed, *map(os.path.realpath, needed)}
    kept: list[str] = []
    for path in sorted(paths):
        if not any(path.startswith(other.rstrip("/") + "/") for other in kept):
            kept.append(path)
    return [path for path in kept if path != "/"]


def _bind(path: str, root: str, *, read_only: bool = True) -> None:
    target = root + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _mount(path, target, None, MS_BIND | MS_REC)
    if not read_only:
        return
    assert _libc is not None
    recursive, at_cwd = 0x8000, -100
    # MOUNT_ATTR_* have the values of MS_*.
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    done = _libc.syscall(
        _SYSCALL_MOUNT_SETATTR, at_cwd, os.fsencode(target), recursive, attributes, len(attributes)
    )
    if done < 0:  # Linux < 5.12: the top mount alone; what it had must be repeated
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048 | 4096)
        _mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def fork_program() -> int:
    """`os.fork`, the child in a process-id namespace of its own where namespaces are active."""
    if not active.namespaces:
        return os.fork()
    assert _libc_with_gil is not None and _machine is not None
    ctypes.pythonapi.PyOS_BeforeFork()
    flags = ctypes.c_long(NEWPID | signal.SIGCHLD)
    pid = int(_libc_with_gil.syscall(_CLONE[_machine[0]], flags, 0, 0, 0, 0))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number))
    return pid


def fresh_scratch() -> str | None:
    """An empty folder in memory for one program; `None` where only a folder on disk is available."""
    if not active.namespaces:
        return None
    _mount("scratch", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, b"size=67108864,nr_inodes=4096,mode=0700")
    return SCRATCH


def drop_scratch() -> None:
    """Unmount the scratch folder."""
    assert _libc is not None
    with suppress(OSError):
        _check(_libc.umount2(os.fsencode(SCRATCH), MNT_DETACH))


def reap_orphans() -> None:
    """Make this process the parent of descendants that lose theirs."""
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that made it ends."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)


def hide_memory() -> None:
    """No other process of this user may read this one's memory."""
    if _libc is not None:
        _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


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


def give_up_privileges() -> None:
    """In the program's process: no capabilities, and only harmless system calls, permanently."""
    if _libc is None:
        return
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if active.namespaces:
        header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        _libc.capset(header, bytes(24))
    if active.seccomp:
        _check(_libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(_Filter.build()), 0, 0))


class _Filter(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))
    _kept: Any = None

    @classmethod
    def build(cls) -> Self:
        assert _machine is not None
        arch = _machine[0]
        allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # errno EPERM, ENOSYS
        load, equal, greater, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
        # Offsets into `struct seccomp_data`: number 0, architecture 4, arguments from 16 on, 8 bytes each.
        program = [(load, 0, 0, 4), (equal, 1, 0, _machine[1]), (give, 0, 0, kill), (load, 0, 0, 0)]
        if arch == 0:
            program += [(greater, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 numbering
        for numbers in _DENIED.values():
            if numbers[arch] >= 0:
                program += [(equal, 0, 1, numbers[arch]), (give, 0, 0, refuse)]
        program += [(equal, 0, 1, _CLONE3[arch]), (give, 0, 0, absent)]  # libc then uses clone
        program += [(equal, 0, 4, _CLONE[arch]), (load, 0, 0, 16), (bits, 1, 0, _CLONE_THREAD)]
        program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
        # A signal to itself kills it here: the kernel ignores one to the first process of a namespace.
        for number in (_KILL[arch], _TGKILL[arch]):
            program += [(equal, 0, 4, number), (load, 0, 0, 16), (equal, 1, 0, os.getpid())]
            program += [(give, 0, 0, refuse), (give, 0, 0, kill)]
        program += [(give, 0, 0, allow)]
        code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
        cls._kept = ctypes.create_string_buffer(code)
        return cls(len(program), ctypes.addressof(cls._kept))
