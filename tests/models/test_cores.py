import os
import platform
from pathlib import Path

import pytest

from models.cores import (
    available_cores,
    has_amx,
    instructions,
    multiplies_bfloat16,
    processor,
)

MASK = {0, 2, 5}
HERE = len(MASK)


@pytest.fixture(autouse=True)
def _larger_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: MASK)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", HERE),
        ("50000 100000", 1),
        ("150000 100000", 2),
        ("9900000 100000", HERE),
        ("nonsense", HERE),
    ],
)
def test_the_container_s_quota_counts(
    monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr("models.cores.limits", lambda _: ["max 100000", quota])
    assert available_cores() == cores


def test_without_a_cgroup_the_affinity_mask_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.cores.limits", lambda _: [])
    assert available_cores() == HERE


@pytest.mark.parametrize(
    ("flags", "amx", "bfloat16"),
    [
        ("fpu avx512_bf16 amx_bf16 amx_tile", True, True),
        ("fpu avx512_bf16 avx512_vnni", False, True),
        ("fpu avx512_vnni", False, False),
    ],
)
def test_what_they_multiply_is_among_a_processor_s_flags(
    tmp_path: Path, flags: str, amx: bool, bfloat16: bool
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert (has_amx(file), multiplies_bfloat16(file)) == (amx, bfloat16)


def test_a_processor_is_called_what_the_kernel_calls_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: An Old One @ 2 GHz\nflags\t: fpu\n")
    assert processor(file) == "An Old One @ 2 GHz"
    one = "cpu family\t: 23\nmodel\t\t: {}\nmodel name\t: One of Many\nflags\t: fpu\n\n"
    file.write_text(one.format(1) + one.format(1))
    assert processor(file) == "One of Many (family 23, model 1)"
    assert processor(tmp_path / "nowhere") == platform.machine()


@pytest.mark.parametrize(
    ("flags", "widest"),
    [
        ("fpu avx2 avx512f avx512_vnni avx512_bf16 amx_bf16", "AMX"),
        ("fpu avx2 avx512f avx512_vnni avx512_bf16", "AVX-512 BF16"),
        ("fpu avx2 avx512f avx512_vnni", "AVX-512 VNNI"),
        ("fpu avx avx2 fma", "AVX2"),
    ],
)
def test_its_widest_instructions_are_named(tmp_path: Path, flags: str, widest: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name\t: A New One\nflags\t\t: {flags}\n")
    assert instructions(file) == widest
    assert processor(file) == f"A New One with {widest}"


def test_where_nothing_is_known_of_the_processor_it_does_not(tmp_path: Path) -> None:
    assert not has_amx(tmp_path / "nowhere")
    assert not multiplies_bfloat16(tmp_path / "nowhere")
    assert instructions(tmp_path / "nowhere") is None
