import errno
import fcntl
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from app import keys as module
from app.keys import Key, Keys, KeysError, create_key, read_keys, revoke_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A clock that goes on when it is told to."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_key_is_found_and_nothing_like_it(path: Path) -> None:
    key = create_key(path, "tool", ("predict",), None)
    found = Keys(path).find(key)
    assert found is not None
    assert (found.name, found.scopes, found.per_minute) == ("tool", ("predict",), None)
    prefix, identity, secret = key.split("_", 2)
    for wrong in ("", key[:-1], key + "x", f"{prefix}_{identity}", f"x_{identity}_{secret}"):
        assert Keys(path).find(wrong) is None
    assert Keys(path).find(f"{prefix}_00000000_{secret}") is None


def test_the_file_holds_no_secret_and_only_its_owner_reads_it(path: Path) -> None:
    key = create_key(path, "tool", ("predict",), None)
    assert key.split("_", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_revoked_key_is_noticed_without_a_restart(path: Path, clock) -> None:
    first, second = (create_key(path, name, ("predict",), None) for name in ("a", "b"))
    running = Keys(path)
    assert running.find(first)
    assert revoke_key(path, "a").name == "a"
    clock.now += 2
    assert running.find(first) is None
    assert running.find(second)
    third = create_key(path, "a", ("metrics",), None)  # the name is free again
    clock.now += 2
    assert running.find(third)


def test_a_file_system_that_hangs_holds_up_nobody(
    path: Path, clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = create_key(path, "tool", ("predict",), None)
    running = Keys(path)
    revoke_key(path, "tool")
    looks, goes_on = count(), threading.Event()

    def hang(path: Path) -> tuple[Key, ...]:
        next(looks)
        assert goes_on.wait(30)
        return read_keys(path)

    monkeypatch.setattr(module, "read_keys", hang)
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.05)
    with capture_logs() as logged:
        for _ in range(3):
            clock.now += 2
            assert running.find(key)  # nobody can know better
            assert running.stale
    assert next(looks) == 1  # one look is enough to wait for
    assert [line["reason"] for line in logged] == ["its file system does not answer"]
    goes_on.set()
    running._looking.result(30)
    assert not running.stale
    assert running.find(key) is None


def test_without_a_thread_the_keys_that_were_read_hold(
    path: Path, clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = create_key(path, "tool", ("predict",), None)
    running = Keys(path)

    def none(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(module, "begin", none)
        clock.now += 2
        assert running.find(key)
        assert running.stale
    clock.now += 2
    assert not running.stale


def test_a_file_that_is_damaged_meanwhile_leaves_the_keys_that_were_read(path: Path, clock) -> None:
    key = create_key(path, "tool", ("predict",), None)
    running = Keys(path)
    assert not running.stale
    whole = path.read_bytes()
    path.write_text("{")
    clock.now += 2
    assert running.find(key)
    assert running.stale
    path.unlink()
    clock.now += 2
    assert running.stale
    assert running.find(key)
    path.write_bytes(whole)
    clock.now += 2
    assert not running.stale


def test_a_folder_that_was_away_for_a_moment_leaves_nothing_stale(
    path: Path, clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_key(path, "tool", ("predict",), None)
    running = Keys(path)
    with monkeypatch.context() as patch:

        def gone(*_: object) -> None:
            raise OSError("Stale file handle")

        patch.setattr(module.os, "stat", gone)
        patch.setattr(Path, "read_bytes", gone)
        clock.now += 2
        assert running.stale
    clock.now += 2
    assert not running.stale


def test_keys_that_are_made_at_once_are_all_kept(path: Path) -> None:
    def change(number: int) -> None:
        create_key(path, f"key {number}", ["predict"], None)
        if number % 2:
            revoke_key(path, f"key {number}")

    with ThreadPoolExecutor(8) as together:
        list(together.map(change, range(16)))
    found = read_keys(path)
    assert {key.name for key in found} == {f"key {number}" for number in range(16)}
    assert sum(key.revoked is None for key in found) == 8


def test_a_link_stays_one_to_the_file_that_the_service_reads(path: Path, tmp_path: Path) -> None:
    key = create_key(path, "tool", ("predict",), None)
    link = tmp_path / "elsewhere" / "keys.json"
    link.parent.mkdir()
    link.symlink_to(path)
    other = create_key(link, "other", ("predict",), None)
    revoke_key(link, "tool")
    assert link.is_symlink()
    keys = Keys(path)
    assert (keys.find(key), keys.find(other) is None) == (None, False)


def test_a_key_named_as_another_one_s_id_is_not_taken_for_it(path: Path) -> None:
    create_key(path, "tool", ("predict",), None)
    (first,) = read_keys(path)
    create_key(path, first.id, ("predict",), None)
    second = read_keys(path)[1]
    with pytest.raises(KeysError, match=f"by its name 'tool' or id {second.id}"):
        revoke_key(path, first.id)
    assert revoke_key(path, second.id) == read_keys(path)[1]
    assert revoke_key(path, first.id).name == "tool"


def test_a_quota_is_a_minute_s_requests_and_refills(path: Path, clock) -> None:
    key = create_key(path, "tool", ("predict",), 3)
    running = Keys(path)
    found = running.find(key)
    assert found is not None
    assert [running.wait_seconds(found) for _ in range(5)] == [0, 0, 0, 20, 20]
    clock.now += 20
    assert [running.wait_seconds(found) for _ in range(2)] == [0, 20]
    clock.now += 3600
    assert [running.wait_seconds(found) for _ in range(4)] == [0, 0, 0, 20]


def test_who_waits_as_long_as_is_said_is_let_in(path: Path, clock) -> None:
    key = create_key(path, "tool", ("predict",), 7)
    running = Keys(path)
    found = running.find(key)
    assert found is not None
    assert [running.wait_seconds(found) for _ in range(8)] == [0] * 7 + [9]  # of 8.57
    clock.now += 9
    assert running.wait_seconds(found) == 0


def test_a_quota_that_is_changed_in_the_file_holds_from_then_on(path: Path, clock) -> None:
    key = create_key(path, "tool", ("predict",), 3)
    running = Keys(path)
    for per_minute, waits in ((3, [0, 0]), (1, [0, 60])):
        path.write_text(path.read_text().replace('"per_minute": 3', f'"per_minute": {per_minute}'))
        clock.now += 2
        found = running.find(key)
        assert found is not None
        assert [running.wait_seconds(found) for _ in range(2)] == waits


def test_processes_that_share_a_folder_count_a_key_s_requests_together(
    path: Path, tmp_path: Path, clock
) -> None:
    key = create_key(path, "tool", ("predict",), 3)
    running = [Keys(path, tmp_path) for _ in range(2)]
    found = running[0].find(key)
    assert found is not None
    assert [running[i % 2].wait_seconds(found) for i in range(5)] == [0, 0, 0, 20, 20]
    clock.now += 20
    assert [each.wait_seconds(found) for each in running] == [0, 20]
    for each in running:  # the folder is gone: each counts for itself
        each._shared = tmp_path / "gone"
    clock.now += 3600
    assert [each.wait_seconds(found) for each in running * 3] == [0, 0, 0, 0, 0, 0]


def test_a_request_that_the_shared_folder_has_no_room_for_is_counted_once(
    path: Path, tmp_path: Path, clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    key = create_key(path, "tool", ("predict",), 3)
    running = Keys(path, tmp_path)
    found = running.find(key)
    assert found is not None
    monkeypatch.setattr("os.pwrite", full)
    assert [running.wait_seconds(found) for _ in range(4)] == [0, 0, 0, 20]


def test_mistakes_are_sentences(path: Path) -> None:
    with pytest.raises(KeysError, match="cannot be read: No such file"):
        Keys(path)
    create_key(path, "tool", ("predict",), None)
    with pytest.raises(KeysError, match="has a key named 'tool': revoke it"):
        create_key(path, "tool", ("predict",), None)
    with pytest.raises(KeysError, match="letters, digits, spaces and signs"):
        create_key(path, "a\x1b[2Jb", ("predict",), None)
    with pytest.raises(KeysError, match="nowhere cannot be read: No such file"):
        create_key(path.parent / "nowhere" / "keys.json", "tool", ("predict",), None)
    with pytest.raises(KeysError, match="no active key named 'other'"):
        revoke_key(path, "other")
    with pytest.raises(KeysError, match="name: String should have at least 1 character"):
        create_key(path, "", ("predict",), None)
    content = json.loads(path.read_text())
    content["keys"][0]["scopes"] = ["everything"]
    path.write_text(json.dumps(content))
    with pytest.raises(KeysError, match=r"is not a key file: keys\.0\.scopes\.0"):
        read_keys(path)


def test_a_file_that_could_not_be_read_is_read_once_it_can_be(
    path: Path, clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = create_key(path, "tool", ("predict",), None)
    running = Keys(path)
    revoke_key(path, "tool")
    with monkeypatch.context() as patch:

        def refuse(_: Path) -> None:
            raise KeysError("Permission denied.")

        patch.setattr(module, "read_keys", refuse)
        clock.now += 2
        assert running.find(key)  # nobody can know better
    clock.now += 2
    assert running.find(key) is None


def test_a_file_that_cannot_be_read_is_logged_once_and_again_when_it_has_changed(
    path: Path, clock
) -> None:
    create_key(path, "tool", ("predict",), None)
    running = Keys(path)
    with capture_logs() as logged:
        whole = path.rename(path.with_name("whole"))
        for content in (None, "{", "[]"):
            if content is not None:
                path.write_text(content)
            for _ in range(3):
                clock.now += 2
                assert running.stale
            path.unlink(missing_ok=True)
        assert len(logged) == 3
        whole.rename(path)
        clock.now += 2
        assert not running.stale
        path.rename(whole)
        clock.now += 2
        assert running.stale
    assert [line["event"] for line in logged] == 4 * ["key file not read again"]


def test_a_file_that_nobody_may_write_is_changed_by_its_owner(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_key(path, "tool", ("predict",), None)
    path.chmod(0o400)
    write = Path.write_text

    def as_no_root(self: Path, text: str) -> int:
        if self.exists() and not self.stat().st_mode & stat.S_IWUSR:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return write(self, text)

    monkeypatch.setattr(Path, "write_text", as_no_root)
    revoke_key(path, "tool")
    assert read_keys(path)[0].revoked
    assert path.stat().st_mode & 0o777 == 0o400


def test_who_could_read_the_file_still_can(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_key(path, "tool", ("predict",), None)
    path.chmod(0o640)
    given: list[tuple[int, int]] = []

    def stat_of_another(self: Path) -> os.stat_result:
        found = os.stat(self)
        if self == path:
            return os.stat_result((*found[:4], 10001, 10002, *found[6:]))
        return found

    monkeypatch.setattr(Path, "stat", stat_of_another)
    monkeypatch.setattr(module.os, "chown", lambda _, user, group: given.append((user, group)))
    revoke_key(path, "tool")
    assert given == [(10001, 10002)]
    assert path.stat().st_mode & 0o777 == 0o640

    def may_not(*_: object) -> None:
        raise PermissionError

    create_key(path, "other", ("predict",), None)
    before = path.read_bytes()
    monkeypatch.setattr(module.os, "chown", may_not)
    with pytest.raises(KeysError, match="belongs to another user"):
        revoke_key(path, "other")
    assert path.read_bytes() == before


def test_a_key_file_is_nobody_else_s_while_it_is_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, save, locked = module.read_keys, module._save, []

    def look() -> None:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
            locked.append(False)
        except BlockingIOError:
            locked.append(True)
        os.close(folder)

    monkeypatch.setattr(module, "read_keys", lambda path: (look(), read(path))[1])
    monkeypatch.setattr(module, "_save", lambda path, keys: (look(), save(path, keys))[1])
    create_key(path, "tool", ("predict",), None)
    create_key(path, "other", ("predict",), None)
    revoke_key(path, "tool")
    assert locked == [True] * 5  # the first has no file to read


def test_a_quota_is_nobody_else_s_while_it_is_counted(
    path: Path, tmp_path: Path, clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = create_key(path, "tool", ("predict",), 3)
    running = Keys(path, tmp_path)
    found = running.find(key)
    assert found is not None
    take, locked = module._Bucket.take, []

    def look(bucket: module._Bucket, now: float) -> int:
        (shared,) = tmp_path.glob("*.bucket")
        with shared.open("rb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
                locked.append(False)
            except BlockingIOError:
                locked.append(True)
        return take(bucket, now)

    monkeypatch.setattr(module._Bucket, "take", look)
    assert running.wait_seconds(found) == 0
    assert locked == [True]
