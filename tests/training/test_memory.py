"""What training frees is kept for its next step."""

import subprocess
import sys

# Faults: pages that the kernel had to give (again) to hold a block of 48 MB, taken ten times.
SCRIPT = """
import resource, sys
from training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
taken = bytearray(48_000_000); del taken
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    taken = bytearray(48_000_000); del taken
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    out = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, check=True)
    return int(out.stdout)


def test_the_kernel_is_not_asked_again() -> None:
    assert faults("keep") < faults("leave") / 10
