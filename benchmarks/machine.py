"""The machine that a benchmark runs on."""

import platform
from pathlib import Path


def processor() -> str:
    """Its name, where the kernel tells it; else its architecture."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
