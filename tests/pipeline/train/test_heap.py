"""What is freed stays with the process, counted in page faults of a process of its own."""

import ctypes
import platform
import subprocess
import sys

import pytest

from pipeline.train import heap

FAULTS = """
import ctypes, resource, sys
from pipeline.train import heap
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] != "returned":
    assert heap.keep_freed(short=sys.argv[1] == "short")
def step(size):
    block = c.malloc(size)
    c.memset(block, 1, size)
    c.free(block)
step(40 << 20)
before = faults()
step(40 << 20)
print((faults() - before) * resource.getpagesize() / (40 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_freed_block_comes_back_without_fresh_pages_unless_memory_is_short(root):
    def fresh(kind):
        command = [sys.executable, "-c", FAULTS, kind]
        return float(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)

    assert fresh("kept") < 0.1 < 0.9 < min(fresh("returned"), fresh("short"))


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert heap.keep_freed() is False
