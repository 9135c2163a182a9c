"""Near-duplicates: pictures that show the same lesion in the same frame, whatever their ids say.

Found by a perceptual hash, verified on pixels. The thresholds stand where the data of ISIC leaves a
gap: copies of an image (resized, squashed, recompressed) differ in at most 6 of the hash's 256 bits
and agree in detail at 0.98 and above, a copy with other colours at 0.94, different lesions at 0.83
and below.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from models.images import ImageError, decode
from training.data.manifest import Record

SIDE = 64
MOST_BITS = 20
LEAST_AGREEMENT = 0.90
_GRID = 16
_BITS = _GRID * _GRID
_BLUR = 3.0
# Standard deviation, of 255.
_LEAST_CONTRAST = 1.0
_CHUNK = 2048

Thumbnails = NDArray[np.uint8]
Floats = NDArray[np.float32]
Number = TypeVar("Number", bound=np.generic)
# Positions of two pictures, the lower one first.
Pair = tuple[int, int]


def thumbnail(pixels: NDArray[np.uint8]) -> Thumbnails:
    """uint8 [H, W, 3] -> uint8 [64, 64], grey."""
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(grey)


def thumbnails_of(records: Sequence[Record]) -> Thumbnails:
    """The thumbnails of image files, decoded as the network sees them.

    Args:
        records: With pixels.

    Returns:
        uint8 [len(records), 64, 64]; an image that cannot be read is black, and like no other.
    """

    def read(position: int) -> NDArray[np.uint8]:
        try:
            return decode(Path(records[position].path).read_bytes(), SIDE, SIDE).pixels
        except (OSError, ImageError):
            return np.zeros((SIDE, SIDE, 3), np.uint8)

    return thumbnails(read, len(records))


def pair_up(records: Sequence[Record]) -> list[Pair]:
    """All near-duplicates among the records that have pixels; positions are in `records`."""
    pictured = [position for position, record in enumerate(records) if record.path]
    found = find_duplicates(thumbnails_of([records[i] for i in pictured]))
    return [(pictured[one], pictured[other]) for one, other in found]


def thumbnails(read: Callable[[int], NDArray[np.uint8]], count: int) -> Thumbnails:
    """The thumbnails of `count` images, read and shrunk in parallel.

    Args:
        read: The pixels of an image, by position: uint8 [H, W, 3].
        count: Number of images.

    Returns:
        uint8 [count, 64, 64].
    """
    found = np.empty((count, SIDE, SIDE), np.uint8)
    with ThreadPoolExecutor() as pool:
        small = pool.map(lambda position: thumbnail(read(position)), range(count))
        for position, picture in enumerate(tqdm(small, "compare", count, unit="image")):
            found[position] = picture
    return found


def find_duplicates(images: Thumbnails) -> list[Pair]:
    """All pairs of near-duplicates, turned and mirrored ones too.

    Args:
        images: uint8 [N, 64, 64].

    Returns:
        Sorted by position, each pair once.
    """
    # Blank pictures are all alike, and show no lesion.
    seen = np.flatnonzero(images.reshape(-1, SIDE * SIDE).std(axis=1) >= _LEAST_CONTRAST)
    if len(seen) < len(images):
        return [(int(seen[one]), int(seen[other])) for one, other in find_duplicates(images[seen])]
    bits = _bits(images)
    found: set[Pair] = set()
    for orientation in range(8):
        turned = _turn(bits.reshape(-1, _GRID, _GRID), orientation).reshape(-1, _BITS)
        candidates = np.concatenate([np.zeros((0, 2), int), *_close(bits, turned)])
        agree = _agreement(images, candidates, orientation) >= LEAST_AGREEMENT
        found.update((one, other) for one, other in candidates[agree].tolist())
    return sorted(found)


def _bits(images: Thumbnails) -> Floats:
    """The hash: where a 16 x 16 picture is above its median. +1 and -1, float32 [N, 256]."""
    side = SIDE // _GRID
    small = images.reshape(-1, _GRID, side, _GRID, side).mean(axis=(2, 4), dtype=np.float32)
    flat = small.reshape(-1, _BITS)
    return np.where(flat > np.median(flat, axis=1, keepdims=True), 1, -1).astype(np.float32)


def _close(bits: Floats, turned: Floats) -> Iterator[NDArray[np.intp]]:
    """Pairs (one < other) whose hashes differ in few bits: for +1 and -1, one matrix product."""
    for start in range(0, len(bits), _CHUNK):
        alike = bits[start : start + _CHUNK] @ turned[start:].T
        rows, columns = np.nonzero(alike >= _BITS - 2 * MOST_BITS)
        later = columns > rows
        yield np.stack([rows[later], columns[later]], axis=1) + start


def _agreement(images: Thumbnails, pairs: NDArray[np.intp], orientation: int) -> Floats:
    """Correlation of what a blur takes away: light and colour of a copy may differ, detail not."""
    values = np.zeros(len(pairs), np.float32)
    for start in range(0, len(pairs), _CHUNK):
        ones, others = pairs[start : start + _CHUNK].T
        first = _detail(images[ones])
        second = _detail(_turn(images[others], orientation))
        values[start : start + _CHUNK] = (first * second).sum(axis=(1, 2))
    return values


def _detail(images: Thumbnails) -> Floats:
    """float32 [N, 58, 58], each of zero mean and unit length (or zero, where there is none)."""
    grey = images.astype(np.float32)
    edge = round(_BLUR)
    detail = (grey - gaussian_filter(grey, (0, _BLUR, _BLUR)))[:, edge:-edge, edge:-edge]
    detail -= detail.mean(axis=(1, 2), keepdims=True)
    length = np.sqrt((detail**2).sum(axis=(1, 2), keepdims=True))
    found: Floats = detail / np.maximum(length, 1.0)
    return found


def _turn(images: NDArray[Number], orientation: int) -> NDArray[Number]:
    """One of the eight ways to lay a square picture."""
    turned = np.rot90(images, orientation % 4, axes=(1, 2))
    return turned[:, :, ::-1] if orientation >= 4 else turned
