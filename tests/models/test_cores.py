import os
from pathlib import Path

import pytest

from models.cores import available_cores

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", HERE), ("50000 100000", 1), ("9900000 100000", HERE), ("nonsense", HERE)],
)
def test_the_container_s_quota_counts(tmp_path: Path, quota: str, cores: int) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert available_cores(file) == cores


def test_without_a_cgroup_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "nowhere") == HERE
