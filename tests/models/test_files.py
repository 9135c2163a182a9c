import os
from pathlib import Path

import pytest

from models.files import clear_unfinished, read_small, write_atomically


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in ("one", "two"):
        with write_atomically(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="read-only"), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise OSError("read-only")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_left_unfinished_is_cleared(tmp_path: Path) -> None:
    for name in (".checkpoint.pt.123.part", "checkpoint.pt", ".hidden", "a.part"):
        (tmp_path / name).write_text("")
    (tmp_path / ".bundle.123.part").mkdir()
    clear_unfinished(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint.pt", ".hidden", "a.part", ".bundle.123.part"}


def test_a_link_stays_one_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for content in ("one", "two"):
        with write_atomically(tmp_path / "link") as temporary:
            temporary.write_text(content)
        assert (tmp_path / "there" / "file").read_text() == content
        assert (tmp_path / "link").is_symlink()


def test_what_is_no_file_is_not_made_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="it is no file"), write_atomically(path):
            pytest.fail("it would be replaced")
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_is_said_of_the_file_that_was_asked_for(tmp_path: Path) -> None:
    for name in (None, "temporary"):
        with (
            pytest.raises(OSError, match="No space") as full,
            write_atomically(tmp_path / "file") as temporary,
        ):
            raise OSError(28, "No space left on device", str(temporary) if name else None)
        assert full.value.filename == str(tmp_path / "file")


def test_a_small_file_is_read_whole_and_a_longer_one_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert read_small(path, 3) == b"abc"
    with pytest.raises(OSError, match="it has more than 2 bytes"):
        read_small(path, 2)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no file"):
        read_small(tmp_path / "pipe", 3)


def test_a_folder_in_a_file_s_place_leaves_nothing_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Is a directory"):
        read_small(tmp_path, 3)
    assert os.listdir("/proc/self/fd") == before
