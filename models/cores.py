"""How many CPUs this process may use."""

import os
from math import ceil
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(quota: Path = _QUOTA) -> int:
    """CPUs of the affinity mask, or of the container's cgroup quota where that is fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        limit, period = quota.read_text().split()
        cores = min(cores or 1, ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        pass
    return max(cores or 1, 1)
