"""Memory that a training step frees on a CPU stays with the process, as torch's CUDA allocator keeps a GPU's.

glibc returns what is freed at the end of its heap, and any block above 32 MiB, to the system. The next step
gets it as fresh pages, 4 KiB at a time, each cleared first: ten thousand and more in a step of 12M
parameters, 3 to 12 % of its time (docs/LOG.md).

Kept blocks of many sizes leave holes that the next tensor does not fit into. Training that computes
activations again, to save memory, therefore returns its large blocks.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD."""
KEPT = 1 << 30
"""Bytes at the heap's end that stay, and from which a block is taken from the system by itself."""
RETURNED = 4 << 20
"""Bytes from which a block is taken by itself, and returned when freed, where memory is short."""


def keep_freed(short: bool = False) -> bool:
    """Keep what the process frees from now on, or, where memory is `short`, only small blocks of it.

    False where the C library has no such setting."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEPT) and mallopt(MMAP_THRESHOLD, RETURNED if short else KEPT))
