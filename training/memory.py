"""Have the C library keep what training frees: a step asks for the same gigabyte again."""

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let this process's heap hold freed memory, large blocks too, instead of the kernel.

    Otherwise glibc maps each large activation anew, and the kernel clears its pages, in every step
    (benchmarks/training_speed.py measures it).

    Returns:
        Whether the C library is one that can (glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(name, value)
        for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    )
