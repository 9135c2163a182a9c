"""API keys: hashed in a file, each with a name, scopes and a quota; revoked without a restart.

A key is `mmtl_ID_SECRET`. The secret is 256 random bits: nobody guesses it from its SHA-256, as
they would a password that a person chose. It is shown once, when the key is made.
"""

import fcntl
import hashlib
import hmac
import os
import secrets
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Literal, get_args

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.files import write_atomically
from models.threads import begin

Scope = Literal["predict", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_PREFIX = "mmtl"
# How often the file is looked at for keys that are new or revoked.
_FRESH_SECONDS = 1.0
# That a look at it is waited for; then the keys that were read last hold until it has ended.
_PATIENCE_SECONDS = 0.5
log = structlog.get_logger()


# A bucket's tokens, and when it was filled; all processes of a machine have one monotonic clock.
_BUCKET = struct.Struct("<dd")


class KeysError(Exception):
    """A key file that cannot be used, or a key that is not in it; the message says which."""


class Key(BaseModel):
    """One key, as the file holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9]{8}$")
    name: str = Field(min_length=1, max_length=100)
    scopes: tuple[Scope, ...] = Field(min_length=1)
    per_minute: int | None = Field(None, ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: datetime
    revoked: datetime | None = None


class KeyFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    keys: tuple[Key, ...] = ()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file, revoked ones too.

    Raises:
        KeysError: It cannot be read, or is none.
    """
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"]
        raise KeysError(f"{path} is not a key file: {said}.") from None


def create_key(path: Path, name: str, scopes: Sequence[Scope], per_minute: int | None) -> str:
    """Add a key to a file, which is made where there is none.

    Returns:
        The key; nobody can read it out of the file again.

    Raises:
        KeysError: The file is not one of keys, or has an active key of that name; the name cannot
            be shown; or there is no such folder.
    """
    if not name.isprintable():
        raise KeysError("A key's name has letters, digits, spaces and signs, and nothing else.")
    identity, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    try:
        made = Key(
            id=identity,
            name=name,
            scopes=tuple(scopes),
            per_minute=per_minute,
            sha256=_hash(secret),
            created=datetime.now(UTC).replace(microsecond=0),
        )
    except ValidationError as error:
        raise KeysError(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}.") from None
    path = path.resolve()  # a link stays one, to what the service reads
    with _alone(path):
        keys = read_keys(path) if path.exists() else ()
        if any(key.name == name and key.revoked is None for key in keys):
            raise KeysError(
                f"{path} has a key named {name!r}: revoke it first, or choose another name."
            )
        _save(path, (*keys, made))
    return f"{_PREFIX}_{identity}_{secret}"


def revoke_key(path: Path, name: str) -> Key:
    """Revoke the active key of a name, or of an id; a running service notices within a second.

    Raises:
        KeysError: There is none, or one of that name and another of that id.
    """
    path = path.resolve()  # a link stays one, to what the service reads
    with _alone(path):
        keys = read_keys(path)
        meant = [key for key in keys if name in (key.name, key.id) and key.revoked is None]
        if not meant:
            raise KeysError(
                f"{path} has no active key named {name!r}; `mmtl keys list` shows them."
            )
        if len(meant) > 1:
            raise KeysError(
                f"{path} has a key named {name!r}, and another one with that id: revoke the one "
                f"that is meant by its {' or '.join(_other_than(name, key) for key in meant)}."
            )
        ended = meant[0].model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
        _save(path, tuple(ended if each is meant[0] else each for each in keys))
        return ended


def _other_than(name: str, key: Key) -> str:
    return f"id {key.id}" if key.name == name else f"name {key.name!r}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Change a key file while nobody else does: a key that was handed out must not be lost.

    The folder is locked, as the file is another one after each change.

    Raises:
        KeysError: There is no such folder.
    """
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise KeysError(f"{path.parent} cannot be read: {error.strerror}.") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
        yield
    finally:
        os.close(folder)


def _save(path: Path, keys: tuple[Key, ...]) -> None:
    with write_atomically(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(KeyFile(keys=keys).model_dump_json(indent=2) + "\n")
        if path.exists():  # an operator may have let the service's user read it
            _take_owner(temporary, path)


def _take_owner(made: Path, before: Path) -> None:
    """Let those read a file who could read the one that it replaces."""
    had, has = before.stat(), made.stat()
    if (had.st_uid, had.st_gid) != (has.st_uid, has.st_gid):
        try:
            os.chown(made, had.st_uid, had.st_gid)
        except OSError:
            raise KeysError(
                f"{before} belongs to another user or group, whose service could not read it any "
                "more. Change it as that user, or as root."
            ) from None
    made.chmod(had.st_mode & 0o777)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """The keys that a running service takes, and what each has used of its quota.

    Args:
        path: Of the file.
        shared: Folder of what is used, where several processes count together.

    Raises:
        KeysError: It cannot be read, or is none.
    """

    def __init__(self, path: Path, shared: Path | None = None):
        self._path = path
        self._shared = shared
        self._lock = threading.Lock()
        self._seen = self._mark()
        self._keys = {key.id: key for key in read_keys(path)}
        self._looked = time.monotonic()
        self._looking: Future[None] | None = None
        # The mark of a file that could not be read, which is said once; none is like `()`.
        self._refused: tuple[int, ...] | None = ()
        self._stale = False
        self._buckets: dict[str, _Bucket] = {}

    def find(self, presented: str) -> Key | None:
        """The key that somebody presents, where it is one and active."""
        self._refresh()
        prefix, _, rest = presented.partition("_")
        identity, _, secret = rest.partition("_")
        key = self._keys.get(identity)
        # Compared in any case, so that the time does not tell whether there is such an id.
        same = hmac.compare_digest(_hash(secret), key.sha256 if key else "0" * 64)
        return key if same and prefix == _PREFIX and key and key.revoked is None else None

    @property
    def stale(self) -> bool:
        """Whether the file cannot be read just now: a key that is revoked meanwhile still holds."""
        self._refresh()
        return self._stale

    def wait_seconds(self, key: Key) -> int:
        """Use a request of a key's quota: 0, or after how many seconds there is one again."""
        if key.per_minute is None:
            return 0
        with self._lock:
            bucket = self._buckets.get(key.id)
            if bucket is None or bucket.per_minute != key.per_minute:
                bucket = self._buckets[key.id] = _Bucket(key.per_minute)
            seconds: int | None = None
            if self._shared is not None:
                try:
                    with bucket.kept_in(self._shared / f"{key.id}.bucket"):
                        seconds = bucket.take(time.monotonic())
                except OSError as error:  # the folder is gone, or full
                    log.error("request counted by this process alone", reason=error.strerror)
            return bucket.take(time.monotonic()) if seconds is None else seconds

    def _refresh(self) -> None:
        """Look at the file, in a thread of its own: a file system may hang, and callers would."""
        with self._lock:
            ended = self._looking is None or self._looking.done()
            if not ended or time.monotonic() - self._looked < _FRESH_SECONDS:
                return
            self._looked = time.monotonic()
            try:
                looking = self._looking = begin(self._look)
            except RuntimeError as error:  # no thread is to be had just now
                self._missed(str(error))
                return
        try:
            looking.result(_PATIENCE_SECONDS)
        except TimeoutError:
            self._missed("its file system does not answer")

    def _missed(self, reason: str) -> None:
        self._stale = True
        log.error("key file not read again", reason=reason)

    def _look(self) -> None:
        mark = self._mark()
        if mark == self._seen:
            self._stale, self._refused = False, ()
            return
        try:
            self._keys = {key.id: key for key in read_keys(self._path)}
        except KeysError as error:  # those that were read last still hold
            if mark != self._refused:
                log.error("key file not read again", reason=str(error))
            self._refused, self._stale = mark, True
        else:
            self._seen, self._stale, self._refused = mark, False, ()

    def _mark(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


class _Bucket:
    """A token bucket: a minute's quota at once, and then as it refills."""

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self._tokens = float(per_minute)
        self._filled = time.monotonic()

    @contextmanager
    def kept_in(self, path: Path) -> Iterator[None]:
        """Take the bucket out of a file, and put it back; one process at a time."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            kept = os.pread(file, _BUCKET.size, 0)
            if len(kept) == _BUCKET.size:
                self._tokens, self._filled = _BUCKET.unpack(kept)
            yield
            os.pwrite(file, _BUCKET.pack(self._tokens, self._filled), 0)
        finally:
            os.close(file)

    def take(self, now: float) -> int:
        gained = (now - self._filled) * self.per_minute / 60
        self._tokens = min(self.per_minute, self._tokens + gained)
        self._filled = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0
        return max(ceil((1 - self._tokens) * 60 / self.per_minute), 1)
