"""The CPUs that this process may use: how many, what they are and what they multiply."""

import os
import platform
from contextlib import suppress
from math import ceil
from pathlib import Path

from models.cgroups import limits

_PROCESSORS = Path("/proc/cpuinfo")
# The kernel's flags, the widest first: what a network's speed hangs on.
_INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
}


def available_cores() -> int:
    """CPUs of the affinity mask, or of a control group's quota where that is fewer."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = here or 1
    for quota in limits("cpu.max"):
        with suppress(ValueError):  # "max": none
            limit, period = map(int, quota.split())
            cores = min(cores, ceil(limit / period))
    return max(cores, 1)


def instructions(processors: Path = _PROCESSORS) -> str | None:
    """Their widest vector instructions, as in `AVX-512 VNNI`; None where the kernel tells none."""
    flags = set(_told(processors).split())
    return next((what for flag, what in _INSTRUCTIONS.items() if flag in flags), None)


def processor(processors: Path = _PROCESSORS) -> str:
    """Their name, family and model, and widest vector instructions, as the kernel tells them.

    Returns:
        As in `AMD EPYC (family 23, model 1) with AVX2`: a hypervisor may call several generations
        by one name. The architecture where they have none.
    """
    first, *_ = _told(processors).split("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    told = {name.strip(): value.strip() for name, _, value in pairs}
    name = told.get("model name") or platform.machine()
    if {"cpu family", "model"} <= told.keys():
        name += f" (family {told['cpu family']}, model {told['model']})"
    widest = instructions(processors)
    return f"{name} with {widest}" if widest else name


def has_amx(processors: Path = _PROCESSORS) -> bool:
    """Whether they have Intel's AMX: matrices of bfloat16 take a fraction of float32's time."""
    return instructions(processors) == "AMX"


def multiplies_bfloat16(processors: Path = _PROCESSORS) -> bool:
    """Whether they multiply bfloat16 numbers: in AMX, or in AVX-512, which gains less by them."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_told(processors).split())


def _told(processors: Path) -> str:
    try:
        return processors.read_text()
    except (OSError, UnicodeDecodeError):  # not Linux
        return ""
