"""Who may learn from what: connected components across datasets, and the fixed splits over them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.data.manifest import Record, Split

TEST_MODULUS = 5
VALIDATION_MODULUS = 7
# Correlation of 16 x 16 grey thumbnails above which two images show the same lesion in the same
# frame. Every copy of a HAM10000 image in the balanced set lies above it.
NEAR_DUPLICATE = 0.995
_CHUNK = 1024


def in_test_split(lesion: str) -> bool:
    """The test split that is fixed for ever: a fifth of HAM10000's lesions, by hash."""
    return _hash(lesion) % TEST_MODULUS == 0


def components(
    records: Sequence[Record], pairs: Iterable[tuple[int, int]] = ()
) -> NDArray[np.int32]:
    """Number the groups of images that must stay together.

    Two records are joined when they share an image id (across datasets), a lesion id (within a
    dataset: lesion ids are not one namespace), or stand in `pairs`.

    Args:
        records: All images of all datasets at hand.
        pairs: Positions of records known to be near-duplicates.

    Returns:
        int32 [len(records)], the component of each.
    """
    nodes: dict[tuple[str, ...], int] = {}
    edges = list(pairs)
    for position, record in enumerate(records):
        keys: list[tuple[str, ...]] = [("image", record.image)]
        if record.lesion is not None:
            keys.append(("lesion", record.dataset.split(" ")[0], record.lesion))
        for key in keys:
            edges.append((position, nodes.setdefault(key, len(records) + len(nodes))))
    size = len(records) + len(nodes)
    rows, columns = np.array(edges).T if edges else np.zeros((2, 0), int)
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    labels: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return labels[: len(records)]


def near_duplicates(images: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Pairs of near-identical pictures, found on 16 x 16 grey thumbnails.

    Args:
        images: uint8 [N, H, W, 3].

    Returns:
        Both positions of each pair, the lower one first.
    """
    thumbnails = _thumbnails(images)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(thumbnails), _CHUNK):
        rows, columns = np.nonzero(
            thumbnails[start : start + _CHUNK] @ thumbnails[start:].T > NEAR_DUPLICATE
        )
        above = columns > rows
        found = np.stack([rows[above], columns[above]], axis=1) + start
        pairs += [(int(one), int(other)) for one, other in found]
    return pairs


def assign(
    training: Sequence[Record],
    held_out: Sequence[Record],
    pairs: Iterable[tuple[int, int]] = (),
) -> tuple[list[Record], list[Record]]:
    """Give every record its split and its component.

    Test is the fixed fifth of `training`'s lesions. Of what is left, everything that shares a
    component with it or with `held_out` is excluded; a seventh of the remaining components
    validates.

    Args:
        training: The records to divide (HAM10000).
        held_out: Records that nothing may be trained or tuned on, with or without pixels.
        pairs: Near-duplicates, as positions in `training` followed by `held_out`.

    Returns:
        Both lists, in order, with `split` and `component` filled in. Held-out records are TEST.
    """
    everything = [*training, *held_out]
    labels = components(everything, pairs)
    names: dict[int, str] = {}
    for record, label in zip(everything, labels.tolist(), strict=True):
        names[label] = min(names.get(label, record.image), record.image)
    touched = set(labels[len(training) :].tolist())
    # A component with one tested lesion is tested or left out as a whole: never trained on.
    numbered = list(zip(training, labels.tolist(), strict=False))
    tested = {label for record, label in numbered if in_test_split(record.lesion or record.image)}

    def split(record: Record, label: int) -> Split:
        if in_test_split(record.lesion or record.image):
            return Split.TEST
        if label in touched or label in tested:
            return Split.EXCLUDED
        validates = _hash("validation " + names[label]) % VALIDATION_MODULUS == 0
        return Split.VALIDATION if validates else Split.TRAIN

    done = [
        replace(record, split=split(record, label), component=names[label])
        for record, label in numbered
    ]
    held = [
        replace(record, split=Split.TEST, component=names[label])
        for record, label in zip(held_out, labels[len(training) :].tolist(), strict=True)
    ]
    return done, held


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [N, 256], each of zero mean and unit length."""
    count, height, width, _ = images.shape
    grey = np.empty((count, 16, 16), np.float32)
    rows, columns = np.arange(16) * height // 16, np.arange(16) * width // 16
    for position in range(count):
        plane = images[position].mean(axis=2, dtype=np.float32)
        grey[position] = np.add.reduceat(np.add.reduceat(plane, rows, 0), columns, 1)
    flat = grey.reshape(count, -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    return flat
