"""The pixels of a manifest, exactly as serving would decode them, in one memory-mapped file."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features
from tqdm import tqdm

from models import images
from models.files import write_atomically
from models.images import ImageError, decode
from training.data.manifest import DataError, Record

Pixels = NDArray[np.uint8]
# Images between two notes of how far it has come.
_STEP = 512


def build_cache(path: Path, records: Sequence[Record], height: int, width: int) -> Pixels:
    """Decode every record's image into `path`, row i for record i.

    What is there already is used: the whole cache, where images, size and decoder are the same, or
    what an interrupted build left behind.

    Returns:
        uint8 [len(records), height, width, 3], memory-mapped.

    Raises:
        DataError: An image cannot be read; what was decoded before it is kept for the next try.
    """
    key = files_key(records, height, width)
    shape = (len(records), height, width, 3)
    note, partial = path.with_suffix(".json"), path.with_suffix(".part")
    if path.is_file() and _read(note) == {"key": key, "images": len(records)}:
        try:
            return open_cache(path, len(records))
        except DataError:
            note.unlink()  # damaged since: built anew
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = _read(note)
    start = progress.get("images", 0) if progress.get("key") == key and partial.is_file() else 0
    path.unlink(missing_ok=True)
    try:
        pixels = np.lib.format.open_memmap(partial, mode="r+") if start else None
    except (OSError, ValueError):
        pixels = None
    if pixels is None or pixels.shape != shape or partial.stat().st_size < pixels.nbytes:
        start = 0
        note.unlink(missing_ok=True)
        pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        # Taken from the disk now: writing into a hole of a mapped file on a full disk is a SIGBUS.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)

    def read(record: Record) -> Pixels:
        try:
            return decode(Path(record.path).read_bytes(), height, width).pixels
        except (OSError, ImageError) as error:
            raise DataError(f"{record.path}: {error}") from None

    bar = tqdm(total=len(records), desc="decode", unit="image", initial=start)
    with ThreadPoolExecutor() as pool:
        for first in range(start, len(records), _STEP):
            last = min(first + _STEP, len(records))
            for position, image in enumerate(pool.map(read, records[first:last]), first):
                pixels[position] = image
                bar.update()
            pixels.flush()
            _write(note, {"key": key, "images": last})
    bar.close()
    del pixels
    _write(note, {"key": key, "images": len(records)})
    partial.replace(path)
    return open_cache(path, len(records))


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
    digest = hashlib.sha256(Path(images.__file__).read_bytes())
    libjpeg = features.version("libjpeg_turbo")
    digest.update(f"{height} {width} Pillow {PIL.__version__} {libjpeg}".encode())
    for record in records:
        try:
            stat = os.stat(record.path)
        except OSError as error:
            raise DataError(f"{record.path}: {error.strerror}.") from None
        digest.update(f"\n{record.image} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read(note: Path) -> dict[str, Any]:
    try:
        found = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(note: Path, content: dict[str, Any]) -> None:
    with write_atomically(note) as temporary:
        temporary.write_text(json.dumps(content))
