"""Landlock: the kernel's own rule about which files a process may touch, with or without namespaces.

Linux 5.13 and later, for every user. Numbers: linux/landlock.h. Metadata (does a path exist, how large is it)
stay visible; what changes them is `seccomp`'s.
"""

import os
import struct
from collections.abc import Sequence
from functools import cache

from rewards.programs.seccomp import checked, libc, machine

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_SPECIAL = 1 << 0 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15  # execute, make devices and sockets, ioctl of devices
_RIGHTS = (0, 13, 14, 15, 15, 16)  # file rights by version of the interface; each has those before it
_NETWORK, _SCOPES = (4, 0b11), (6, 0b11)  # since version: bind and connect; abstract sockets and signals


@cache
def version() -> int:
    """Version of the interface, 0 where the kernel has none or has it switched off."""
    return max(0, libc.syscall(_CREATE_RULESET, None, 0, 1)) if machine else 0


def enforce(readable: Sequence[str], scratch: str | None) -> None:
    """From now on this process reads below `readable`, does anything below `scratch`, and no more.

    Where the version allows it: no TCP, no abstract sockets or signals of processes outside. Rules of before
    stay. Needs PR_SET_NO_NEW_PRIVS. Without Landlock, nothing. OSError: the kernel refused."""
    if not (abi := version()):
        return
    every = (1 << _RIGHTS[min(abi, len(_RIGHTS) - 1)]) - 1
    network, scopes = (bits if abi >= since else 0 for since, bits in (_NETWORK, _SCOPES))
    attributes = struct.pack("QQQ", every, network, scopes)
    made = checked(libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    rules = [(path, _READ_FILE | _READ_DIR) for path in (*readable, "/dev/zero", "/dev/urandom")]
    rules.append((os.devnull, _READ_FILE | _WRITE_FILE | _TRUNCATE))
    if scratch:
        rules.append((scratch, ~_SPECIAL))
    for path, rights in rules:
        try:
            at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        of_file = ~0 if os.path.isdir(path) else _READ_FILE | _WRITE_FILE | _TRUNCATE
        checked(libc.syscall(_ADD_RULE, made, 1, struct.pack("=Qi", rights & every & of_file, at), 0))
        os.close(at)
    checked(libc.syscall(_RESTRICT_SELF, made, 0))
    os.close(made)
