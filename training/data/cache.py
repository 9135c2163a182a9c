"""The pixels of a manifest, exactly as serving would decode them, in one memory-mapped file."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from models.files import write_atomically
from models.images import ImageError, decode
from training.data.manifest import DataError, Record

Pixels = NDArray[np.uint8]


def build_cache(path: Path, records: Sequence[Record], height: int, width: int) -> Pixels:
    """Decode every record's image into `path`, row i for record i.

    Returns:
        uint8 [len(records), height, width, 3], memory-mapped.

    Raises:
        DataError: An image cannot be read; nothing is written.
    """

    def read(record: Record) -> Pixels:
        try:
            return decode(Path(record.path).read_bytes(), height, width).pixels
        except (OSError, ImageError) as error:
            raise DataError(f"{record.path}: {error}") from None

    with write_atomically(path) as temporary:
        pixels = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.uint8, shape=(len(records), height, width, 3)
        )
        # Taken from the disk now: writing into a hole of a mapped file on a full disk is a SIGBUS.
        with temporary.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        with ThreadPoolExecutor() as pool:
            decoded = tqdm(pool.map(read, records), "decode", len(records), unit="image")
            for position, image in enumerate(decoded):
                pixels[position] = image
        pixels.flush()
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
