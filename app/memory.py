"""What the C library does with memory that is free again."""

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 * 2**20
# The largest that it takes.
_LARGEST_FROM_HEAP = 32 * 2**20


def keep_freed_memory() -> bool:
    """Keep up to 256 MB of freed memory for the next upload, where the C library is glibc.

    Otherwise each upload's megabytes come fresh from the kernel, page by page, and go back.

    Returns:
        Whether it will.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS: they have no such setting
        return False
    return bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    )
