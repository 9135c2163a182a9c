"""Files that are written whole or not at all, small ones that stay small, and those of a folder."""

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def read_small(path: Path, most: int) -> bytes:
    """A file's content, of which so many bytes may be: who wrote it is not trusted yet.

    Raises:
        OSError: It is longer, is no regular file (a pipe would be waited for without end), or
            cannot be read.
    """

    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)

    with open(path, "rb", opener=open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not to be seen, or is what a file system keeps for itself."""
    return name.startswith(".") or name == "lost+found"


def files_below(
    folder: Path,
    suffixes: Collection[str],
    on_error: Callable[[OSError], object] | None = None,
) -> Iterator[Path]:
    """Files below a folder by their suffixes, in lower case; those aside that `is_hidden`.

    Args:
        folder: To look at.
        suffixes: Theirs.
        on_error: Told of each folder that cannot be read, which is passed over.
    """
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=on_error, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()  # a link back
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            if os.path.splitext(name)[1].lower() in suffixes and not is_hidden(name):
                yield Path(parent, name)


def clear_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder when it was killed; nobody else may write."""
    for unfinished in folder.glob(".*.part"):
        if unfinished.is_file():
            unfinished.unlink(missing_ok=True)


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, and rename it to `path` when the block succeeds.

    The content is on disk before the rename, so that a crash leaves the old file or the new one.
    A link stays one, to what is replaced.

    Raises:
        OSError: Something else than a file is there, such as /dev/null: it would be one afterwards.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is no file: name one", str(path))
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # which has the new name
        finally:
            os.close(folder)
    except OSError as error:
        # Of a full disk the system does not say where it is full, and nobody knows the other name.
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # of a read-only folder, which has been said
            temporary.unlink(missing_ok=True)
