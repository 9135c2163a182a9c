"""What training frees is kept for its next step."""

import os
import subprocess
import sys

import pytest

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


def spinning(**variables: str) -> str:
    """What the OpenMP library says that it read, in a process that trains."""
    before = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    told = {**before, "OMP_DISPLAY_ENV": "verbose", **variables}
    out = subprocess.run(
        [sys.executable, "-c", "import training, torch"], env=told, capture_output=True, check=True
    )
    return out.stderr.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP library there")
def test_threads_that_wait_let_other_programs_have_the_core_soon() -> None:
    assert "GOMP_SPINCOUNT = '10000'" in spinning()
    assert "GOMP_SPINCOUNT = '77'" in spinning(GOMP_SPINCOUNT="77")  # whoever sets it has it
