"""What is freed stays with the process, counted in page faults of a process of its own."""

import ctypes
import platform
import subprocess
import sys

import pytest

from pipeline import heap

FAULTS = """
import resource, sys, torch
from pipeline import heap
if sys.argv[1] == "kept":
    assert heap.keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # the first ones leave holes that are a few bytes too small for the next
    torch.ones(10 << 20)  # 40 MiB, allocated and freed
before = faults()
for _ in range(10):
    torch.ones(10 << 20)
print((faults() - before) * resource.getpagesize() / (400 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_freed_block_comes_back_without_fresh_pages(root):
    def fresh(kind):
        command = [sys.executable, "-c", FAULTS, kind]
        return float(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)

    assert fresh("kept") < 0.2 < 0.9 < fresh("returned")


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert heap.keep_freed() is False
