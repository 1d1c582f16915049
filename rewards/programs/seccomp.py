"""System calls that an untrusted program may not make, as a seccomp filter (Linux on x86-64 and aarch64).

Numbers: the kernel's tables, x86-64's and aarch64's; -1 where an architecture has none.
"""

import ctypes
import os
import platform
import re
import struct
import sys
from functools import cache
from typing import Any

PR_SET_SECCOMP = 22


def _table(text: str) -> dict[str, tuple[int, int]]:
    """NAME=x86-64's number,aarch64's number …"""
    return {name: (int(x), int(a)) for name, x, a in re.findall(r"(\w+)=(-?\d+),(-?\d+)", text)}


DENIED = _table(
    """
    socket=41,198 socketpair=53,199 connect=42,203 bind=49,200 listen=50,201 accept=43,202 accept4=288,242
    sendto=44,206 sendmsg=46,211 sendmmsg=307,269 fork=57,-1 vfork=58,-1 execve=59,221 execveat=322,281
    ptrace=101,117 process_vm_readv=310,270 process_vm_writev=311,271 kcmp=312,272 pidfd_open=434,434
    pidfd_getfd=438,438 pidfd_send_signal=424,424 rt_sigqueueinfo=129,138 rt_tgsigqueueinfo=297,240
    tkill=200,130 mount=165,40 umount2=166,39 pivot_root=155,41 chroot=161,51 unshare=272,97 setns=308,268
    open_tree=428,428 move_mount=429,429 fsopen=430,430 mount_setattr=442,442 mknod=133,-1 mknodat=259,33
    bpf=321,280 perf_event_open=298,241 keyctl=250,219 add_key=248,217 request_key=249,218
    io_uring_setup=425,425 userfaultfd=323,282 name_to_handle_at=303,264 open_by_handle_at=304,265
    init_module=175,105 finit_module=313,273 reboot=169,142 shmget=29,194 shmat=30,196 shmctl=31,195
    semget=64,190 semctl=66,191 semop=65,193 semtimedop=220,192
    msgget=68,186 msgsnd=69,189 msgrcv=70,188 msgctl=71,187
    mq_open=240,180 mq_unlink=241,181
    memfd_create=319,279 inotify_init=253,-1 inotify_init1=294,26 setpriority=141,140
    ioprio_set=251,30 sched_setaffinity=203,122 sched_setattr=314,274 sched_setparam=142,118
    sched_setscheduler=144,119 migrate_pages=256,238 move_pages=279,239 setsid=112,157 setpgid=109,154
    truncate=76,45 setxattr=188,5 lsetxattr=189,6 fsetxattr=190,7 setxattrat=463,463 removexattr=197,14
    lremovexattr=198,15 fremovexattr=199,16 removexattrat=466,466 file_setattr=469,469
    """
)
# Landlock does not see changes of a file's mode, owner or times. A copy of a file asks for them: they do
# nothing then, and succeed.
IGNORED = _table(
    """
    chmod=90,-1 fchmod=91,52 fchmodat=268,53 fchmodat2=452,452 chown=92,-1 fchown=93,55 lchown=94,-1
    fchownat=260,54 utime=132,-1 utimes=235,-1 futimesat=261,-1 utimensat=280,88
    """
)
CLONE, _CLONE3, _KILL, _TGKILL = (56, 220), (435, 435), (62, 129), (234, 131)
_PRLIMIT, _FCNTL, _IOCTL = (302, 261), (72, 25), (16, 29)
_CLONE_THREAD = 0x00010000
_SIGNAL_OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: a signal to another process by way of a file
_OWNERS_AND_FLAGS = (0x8901, 0x8902, 0x5412, 0x40086602, 0x401C5820)  # FIOSETOWN … TIOCSTI, FS_IOC_SETFLAGS …

_ALLOW, _REFUSE, _IGNORE, _ABSENT, _KILLED = 0x7FFF0000, 0x00050001, 0x00050000, 0x00050026, 0x80000000
_LOAD, _GO, _EQUAL, _GREATER, _BITS, _GIVE = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

libc: Any = ctypes.CDLL(None, use_errno=True)
machine = _ARCHITECTURES.get(platform.machine()) if sys.platform == "linux" else None
"""Index into the tables, name in a filter; `None` on a system without these measures."""


def checked(result: int) -> int:
    """The result of a system call; OSError where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, value: int, what: Any = 0) -> int:
    """prctl(2), -1 where there is none."""
    return int(libc.prctl(option, value, what, 0, 0)) if sys.platform == "linux" else -1


@cache
def available() -> bool:
    """Whether the kernel takes filters: one at address 0 is EFAULT then, and EINVAL without them."""
    return machine is not None and prctl(PR_SET_SECCOMP, 2) < 0 and ctypes.get_errno() == 14


def filter_calls() -> None:
    """Only harmless system calls from now on, permanently. OSError: refused. Needs PR_SET_NO_NEW_PRIVS."""
    assert machine is not None
    # A signal to itself kills it here: the kernel ignores one to the first process of a namespace.
    own = (_when(number[machine[0]], 0, (os.getpid(),), _KILLED, _REFUSE) for number in (_KILL, _TGKILL))
    install(_before() + b"".join(own) + _after())


def install(code: bytes) -> None:
    """Filter this process's calls; what `code` does not answer is allowed."""
    code += _packed((_GIVE, 0, 0, _ALLOW))
    kept = ctypes.create_string_buffer(code)
    made = struct.pack("HP", len(code) // 8, ctypes.addressof(kept))  # `struct sock_fprog`, linux/filter.h
    checked(prctl(PR_SET_SECCOMP, 2, made))


@cache
def _before() -> bytes:
    """What decides by an argument, before what depends on the process."""
    assert machine is not None
    arch, name = machine
    # Offsets into `struct seccomp_data`: number 0, architecture 4, arguments from 16 on, 8 bytes each.
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, name), (_GIVE, 0, 0, _KILLED), (_LOAD, 0, 0, 0)]
    if arch == 0:
        program += [(_GREATER, 0, 1, 0x40000000), (_GIVE, 0, 0, _KILLED)]  # the x32 numbering
    # Without clone3, libc uses clone, whose flags a filter can see.
    program += [(_EQUAL, 0, 4, CLONE[arch]), (_LOAD, 0, 0, 16), (_BITS, 1, 0, _CLONE_THREAD)]
    program += [(_GIVE, 0, 0, _REFUSE), (_GIVE, 0, 0, _ALLOW)]
    return (
        _packed(*program)
        + _when(_PRLIMIT[arch], 0, (0,), _ALLOW, _REFUSE)  # its own limits, not another process's
        + _when(_FCNTL[arch], 1, _SIGNAL_OWNERS, _REFUSE, _ALLOW)
        + _when(_IOCTL[arch], 1, _OWNERS_AND_FLAGS, _REFUSE, _ALLOW)
    )


@cache
def _after() -> bytes:
    """The answers to all other numbers."""
    assert machine is not None
    tables = ((DENIED, _REFUSE), (IGNORED, _IGNORE), ({"clone3": _CLONE3}, _ABSENT))
    arch = machine[0]
    answers = {each[arch]: answer for table, answer in tables for each in table.values() if each[arch] >= 0}
    return _searched(sorted(answers.items()))


def _searched(answers: list[tuple[int, int]]) -> bytes:
    """A binary search: for each filter the kernel tries every number, and long chains cost it 0.2 ms."""
    if len(answers) == 1:
        return _packed((_EQUAL, 0, 1, answers[0][0]), (_GIVE, 0, 0, answers[0][1]), (_GIVE, 0, 0, _ALLOW))
    half = len(answers) // 2
    below, above = _searched(answers[:half]), _searched(answers[half:])
    return _packed((_GREATER, 0, 1, answers[half][0]), (_GO, 0, 0, len(below) // 8)) + below + above


def _when(number: int, argument: int, values: tuple[int, ...], matching: int, otherwise: int) -> bytes:
    """The answer to a call by one of its arguments."""
    left = len(values)
    body = [(_LOAD, 0, 0, 16 + 8 * argument)]
    body += [(_EQUAL, left - i, 0 if i < left else 1, value) for i, value in enumerate(values, 1)]
    body += [(_GIVE, 0, 0, matching), (_GIVE, 0, 0, otherwise)]
    return _packed((_EQUAL, 0, len(body), number), *body)


def _packed(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
