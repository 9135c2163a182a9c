"""The audit log: who had which image answered by which network, one JSON line an image.

Nothing of the answer, the picture or the person is in it: an image is named by its SHA-256, a
caller by the id of the key. Lines are only ever added, before the answer is sent; a full file is
renamed and kept.
"""

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import structlog

from app.schemas import ModelFacts

# After which a line is brought to the disk: what a crash of the machine may lose (a crash of the
# process loses nothing).
_SYNC_SECONDS = 1.0
# So long may one line keep the others waiting.
_HANG_SECONDS = 5.0
log = structlog.get_logger()


class AuditError(Exception):
    """The log cannot be written; the message says why."""


class AuditLog:
    """An append-only file, rotated by size.

    Args:
        path: Of the file; made where there is none, readable by its owner alone.
        most: Bytes after which it is renamed to PATH.TIME and another begun.

    Raises:
        AuditError: It cannot be opened.
    """

    def __init__(self, path: Path, most: int):
        self._path = path.resolve()  # where it is turned, it stays on the disk that a link names
        self._most = most
        self._lock = threading.Lock()
        self._sync: threading.Timer | None = None
        self._file = -1
        with self._lock:
            self._open()

    def write(
        self,
        request_id: str,
        key: str | None,
        model: ModelFacts | None,
        images: Sequence[tuple[str, str]],
    ) -> None:
        """Add a line an image, in one piece.

        Args:
            request_id: Of the request.
            key: Id of the caller's key, where there are keys.
            model: That the images were given to, where they were.
            images: SHA-256 and outcome of each: `ok`, the name of its problem, or `gone` where the
                caller was. Of a request that was refused as a whole, an empty SHA-256.

        Raises:
            AuditError: The disk is full, or the file cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": now,
            "request_id": request_id,
            "key": key,
            "model": model.sha256 if model else "",
            "manifest": model.manifest_sha256 if model else "",
        }
        lines = "".join(
            json.dumps({**fields, "image": image, "outcome": outcome}) + "\n"
            for image, outcome in images
        ).encode()
        with self._unlocked():
            try:
                if self._file < 0:
                    raise AuditError(f"{self._path} is closed.")
                with self._alone():
                    written = os.write(self._file, lines)
                    if written < len(lines):
                        # A part of a line is worse than none.
                        os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                        raise AuditError(f"{self._path} cannot be written: no space is left.")
            except OSError as error:
                raise AuditError(f"{self._path} cannot be written: {error.strerror}.") from None
            if self._sync is None:
                timer = threading.Timer(_SYNC_SECONDS, self._bring_to_disk)
                timer.daemon = True
                try:
                    timer.start()
                except RuntimeError:  # no thread is to be had just now
                    self._sync_to_disk(self._file)
                else:
                    self._sync = timer

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Have the log, of this process's threads.

        Raises:
            AuditError: One of them has had it for long: the disk hangs.
        """
        if not self._lock.acquire(timeout=_HANG_SECONDS):
            raise AuditError(f"{self._path} cannot be written: its disk hangs.")
        try:
            yield
        finally:
            self._lock.release()

    def close(self) -> None:
        """Bring everything to the disk, where it does not hang."""
        try:
            self._close()
        except AuditError as error:
            log.error("audit log", reason=str(error))

    def _close(self) -> None:
        with self._unlocked():
            if self._sync is not None:
                self._sync.cancel()
            if self._file >= 0:
                self._sync_to_disk(self._file)
                os.close(self._file)
                self._file = -1

    def _bring_to_disk(self) -> None:
        """Nobody waits for it: others write meanwhile."""
        with self._lock:
            self._sync = None
            if self._file < 0:
                return
            file = os.dup(self._file)
        self._sync_to_disk(file)
        os.close(file)

    def _sync_to_disk(self, file: int) -> None:
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno != errno.EINVAL:  # as a pipe says, which has no disk
                log.error("audit log", reason=f"{self._path} is not on the disk: {error.strerror}.")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the file of now, while no other process of the service writes to it, or turns it."""
        while True:
            locked = self._file
            with suppress(OSError):  # a file system without locks
                fcntl.flock(locked, fcntl.LOCK_EX)
            try:
                self._turn()
                if self._file == locked:
                    yield
                    return
            finally:
                if self._file == locked:
                    with suppress(OSError):
                        fcntl.flock(locked, fcntl.LOCK_UN)

    def _turn(self) -> None:
        """Begin another file where this one is full, or was taken away (logrotate)."""
        here = os.fstat(self._file)
        try:
            there = self._path.stat()
            moved = (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)
        except FileNotFoundError:
            moved = True
        if not moved and here.st_size >= self._most:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
            self._path.rename(self._path.with_name(f"{self._path.name}.{stamp}"))
            moved = True
        if moved:
            old = self._file
            self._open()  # where this fails, the old one stays
            self._sync_to_disk(old)
            with suppress(OSError):
                fcntl.flock(old, fcntl.LOCK_UN)
            os.close(old)

    def _open(self) -> None:
        made = -1
        try:
            made = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with suppress(OSError):  # another process may be in the middle of a line
                fcntl.flock(made, fcntl.LOCK_EX)
            size = os.fstat(made).st_size
            if size and os.pread(made, 1, size - 1) != b"\n":
                os.write(made, b"\n")  # the machine crashed within a line: the next is whole
            with suppress(OSError):
                fcntl.flock(made, fcntl.LOCK_UN)
        except OSError as error:
            if made >= 0:
                os.close(made)
            raise AuditError(f"{self._path} cannot be written: {error.strerror}.") from None
        self._file = made
