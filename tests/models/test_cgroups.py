"""What holds for a process is what holds for each group that it is in."""

from pathlib import Path

import pytest

from models.cgroups import limits


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ("0::/a.slice/b.service\n", ["2", "1", "max"]),
        ("12:memory:/elsewhere\n0::/a.slice\n", ["1", "max"]),
        ("0::/\n", ["max"]),
        ("0::/../elsewhere\n", ["max"]),
        ("0::/gone/c.service\n", ["max"]),
        ("", ["max"]),
    ],
)
def test_a_group_s_limit_and_those_around_it(tmp_path: Path, own: str, found: list[str]) -> None:
    root, file = tmp_path / "groups", tmp_path / "cgroup"
    file.write_text(own)
    for folder, limit in (("", "max"), ("a.slice", "1"), ("a.slice/b.service", "2")):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "memory.max").write_text(f"{limit}\n")
    assert limits("memory.max", root, file) == found


def test_where_there_are_no_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert limits("memory.max", tmp_path, tmp_path / "nowhere") == []
