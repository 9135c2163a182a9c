"""The pixels of a manifest, exactly as serving would decode them, in one memory-mapped file."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features
from torch import Generator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models import colours, headers, images, progressive, tiff
from models.cores import available_cores
from models.files import write_atomically
from models.images import ImageError, decode
from training.data.manifest import DataError, Record

Pixels = NDArray[np.uint8]
# Seconds between two notes of how far it has come.
_PAUSE = 5.0
# What the pixels depend on.
_DECODER = tuple(str(each.__file__) for each in (images, colours, headers, progressive, tiff))
# Images that a process decodes before it says so.
_TOGETHER = 16


def build_cache(
    path: Path,
    records: Sequence[Record],
    height: int,
    width: int,
    on_replace: Callable[[], None] = lambda: None,
) -> Pixels:
    """Decode every record's image into `path`, row i for record i.

    What is there already is used: the whole cache, where images, size and decoder are the same, or
    what an interrupted build left behind.

    Args:
        path: Of the cache; another one there stays until this one is whole.
        records: The images.
        height: In pixels.
        width: In pixels.
        on_replace: Called before one that is there gives way.

    Returns:
        uint8 [len(records), height, width, 3], memory-mapped.

    Raises:
        DataError: An image cannot be read, or a process that decodes died; what was decoded before
            is kept for the next try.
    """
    key = files_key(records, height, width)
    shape = (len(records), height, width, 3)
    note, partial = path.with_suffix(".json"), path.with_suffix(".part")
    how_far = path.with_suffix(".part.json")
    if path.is_file() and _read(note) == {"key": key, "images": len(records)}:
        try:
            return open_cache(path, len(records))
        except DataError:
            note.unlink()  # damaged since: built anew
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = _read(how_far)
    start = progress.get("images", 0) if progress.get("key") == key and partial.is_file() else 0
    try:
        pixels = np.lib.format.open_memmap(partial, mode="r+") if start else None
    except (OSError, ValueError):
        pixels = None
    if pixels is None or pixels.shape != shape or partial.stat().st_size < pixels.nbytes:
        start = 0
        how_far.unlink(missing_ok=True)
        pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        # Taken from the disk now, so that a disk too small is told before hours of decoding.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with partial.open("r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
                except OSError as error:  # which does not say where
                    error.filename = f"{path}, {partial.stat().st_size / 1e6:,.0f} MB"
                    raise

    _fill(partial, pixels, records, start, how_far, key)
    on_replace()
    note.unlink(missing_ok=True)  # it is never that of other pixels
    partial.replace(path)
    how_far.replace(note)
    return open_cache(path, len(records))


def _fill(
    path: Path,
    pixels: "np.memmap[Any, Any]",
    records: Sequence[Record],
    start: int,
    note: Path,
    key: str,
) -> None:
    """Decode into a file's rows from `start` on, and note how far it has come.

    Raises:
        DataError: An image cannot be read, or a process that decodes died.
    """
    done, noted = start, time.monotonic()
    bar = tqdm(total=len(records), desc="decode", unit="image", initial=start)
    try:
        try:
            for problems in _decode(path, pixels, records, start):
                good = next((row for row, problem in enumerate(problems) if problem), len(problems))
                done += good
                bar.update(good)
                if good < len(problems):
                    raise DataError(f"{problems[good]} `mmtl-train data check` shows every fault.")
                if time.monotonic() - noted >= _PAUSE:
                    _note_down(note, key, pixels, done)
                    noted = time.monotonic()
        except BaseException:
            with suppress(OSError):  # a full disk, most likely, which has been said
                _note_down(note, key, pixels, done)
            raise
        finally:
            bar.close()
    except RuntimeError as error:  # torch raises it wherever this process is just then
        if "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            "A process that decodes images died (out of memory, most often). Run the command again."
        ) from None
    _note_down(note, key, pixels, done)


class _Rows(Dataset[str]):
    """Decodes a record's image into its row of a file; an item is what is wrong with it."""

    def __init__(
        self, path: Path, pixels: "np.memmap[Any, Any]", records: Sequence[Record], start: int
    ):
        self.path, self.records, self.start = path, records, start
        self.offset, self.shape = pixels.offset, pixels.shape

    def __len__(self) -> int:
        return len(self.records) - self.start

    def __getitem__(self, item: int) -> str:
        row = self.start + item
        _, height, width, _ = self.shape
        path = Path(self.records[row].path)
        try:
            decoded = decode(path.read_bytes(), height, width).pixels
            path = self.path
            # Written, not mapped: each page of a new file that is mapped is a fault.
            with path.open("r+b") as file:
                file.seek(self.offset + row * decoded.nbytes)
                file.write(np.ascontiguousarray(decoded).data)
        except (OSError, ImageError) as error:
            return f"{path}: {error}"
        return ""


def _decode(
    path: Path, pixels: "np.memmap[Any, Any]", records: Sequence[Record], start: int
) -> DataLoader[str]:
    """Fill a file's rows from `start` on, in order: what is wrong with each image, or nothing.

    In processes, as threads wait for the interpreter where images are small; torch's end soon after
    the one that started them, however that ends.
    """
    return DataLoader(
        _Rows(path, pixels, records, start),
        _TOGETHER,
        num_workers=available_cores() if len(records) - start > _TOGETHER else 0,
        collate_fn=list,
        # Of its own: drawing from torch's would move the caller's random state.
        generator=Generator(),
    )


def open_cache(path: Path, count: int) -> Pixels:
    """Open what `build_cache` wrote.

    Raises:
        DataError: It is missing, damaged, or holds another number of images than `count`.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist. Run `mmtl-train prepare` first.")
    try:
        pixels: Pixels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        raise DataError(f"{path} is damaged. Run `mmtl-train prepare` again.") from None
    if pixels.ndim != 4 or len(pixels) != count:
        raise DataError(
            f"{path} holds {len(pixels)} images, the manifest {count}. "
            "Run `mmtl-train prepare` again."
        )
    return pixels


def files_key(records: Sequence[Record], height: int, width: int) -> str:
    """What decoded pixels depend on: these files in this order, this size, this decoder.

    Raises:
        DataError: A file is not there.
    """
    digest = hashlib.sha256(b"".join(Path(each).read_bytes() for each in _DECODER))
    libjpeg = features.version("libjpeg_turbo")
    digest.update(f"{height} {width} Pillow {PIL.__version__} {libjpeg}".encode())
    for record in records:
        try:
            stat = os.stat(record.path)
        except OSError as error:
            raise DataError(f"{record.path}: {error.strerror}.") from None
        line = f"\n{record.image} {stat.st_size} {stat.st_mtime_ns}"
        digest.update(line.encode(errors="surrogateescape"))  # as file names may be
    return digest.hexdigest()


def _read(note: Path) -> dict[str, Any]:
    try:
        found = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _note_down(note: Path, key: str, pixels: "np.memmap[Any, Any]", done: int) -> None:
    pixels.flush()
    with write_atomically(note) as temporary:
        temporary.write_text(json.dumps({"key": key, "images": done}))
