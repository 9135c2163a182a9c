"""The CPUs that this process may use: how many, what they are and what they multiply."""

import os
import platform
from math import ceil
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_PROCESSORS = Path("/proc/cpuinfo")


def available_cores(quota: Path = _QUOTA) -> int:
    """CPUs of the affinity mask, or of the container's cgroup quota where that is fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        limit, period = quota.read_text().split()
        cores = min(cores or 1, ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        pass
    return max(cores or 1, 1)


def processor(processors: Path = _PROCESSORS) -> str:
    """Their name, where the kernel tells it; else their architecture."""
    try:
        lines = processors.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def has_amx(processors: Path = _PROCESSORS) -> bool:
    """Whether they have Intel's AMX: matrices of bfloat16 take a fraction of float32's time.

    Processors that know such numbers and lack it gain little or nothing by them.
    """
    try:
        return "amx_bf16" in processors.read_text().split()
    except (OSError, UnicodeDecodeError):  # not Linux
        return False
