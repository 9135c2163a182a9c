"""Which images must stay together: the same image, lesion, patient or picture, across datasets."""

import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.data.layouts import name_of
from training.data.manifest import Record, isic_id
from training.data.vocabulary import Split

Bond = Literal["image", "lesion", "patient"]
BONDS: tuple[Bond, ...] = ("image", "lesion", "patient")
# Ids that the archive and its collections prefix (HAM_0000118, IL_3060556, MSK4_0011169,
# IP_7279968) mean the same wherever they stand. Any other, such as "17", is a dataset's own.
_ARCHIVE = re.compile(r"(?:HAM|BCN|IL|IP|MSK\d?|UDA\d?)_\d+", re.IGNORECASE)


def components(
    records: Sequence[Record],
    pairs: Iterable[tuple[int, int]] = (),
    listed: Iterable[tuple[str, str]] = (),
    by: Sequence[Bond] = BONDS,
    same_ids: bool = False,
) -> NDArray[np.int32]:
    """Number the groups of images that must stay together.

    The same lesion has other ids in other datasets, so ids alone find no leak where there is one:
    records of one image are joined first, and with them whatever each table says of it.

    Args:
        records: All images of all datasets at hand.
        pairs: Positions of records known to be near-duplicates.
        listed: Image ids that a dataset lists as duplicates.
        by: What joins.
        same_ids: Lesion and patient ids of any form mean the same in every dataset (one clinic's
            tables).

    Returns:
        int32 [len(records)], the component of each.
    """
    nodes: dict[tuple[str, ...], int] = {}

    def node(key: tuple[str, ...]) -> int:
        return nodes.setdefault(key, len(records) + len(nodes))

    edges = list(pairs)
    for position, record in enumerate(records):
        edges += [(position, node(key)) for bond in by if (key := key_of(record, bond, same_ids))]
    in_list: dict[str, int] = {}
    for pair in listed:
        one, other = (in_list.setdefault(name, node(("listed", name))) for name in pair)
        edges.append((one, other))
    # A list names no dataset, and no folder: all that is called so is joined, at worst too much.
    for position, record in enumerate(records):
        if in_list and (listed_node := in_list.get(name_of(record.image))) is not None:
            edges.append((position, listed_node))
    size = len(records) + len(nodes)
    rows, columns = np.array(edges).T if edges else np.zeros((2, 0), int)
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    labels: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return labels[: len(records)]


def key_of(record: Record, bond: Bond, same_ids: bool = False) -> tuple[str, ...] | None:
    """What a record shares with others by this bond; None where it has no such id."""
    value: str | None = getattr(record, bond)
    if not value:
        return None
    if bond == "image":
        known = isic_id(value)
        return (bond, known) if known else (bond, record.dataset, value)
    if same_ids or _ARCHIVE.fullmatch(value):
        return (bond, value.upper())
    return (bond, record.dataset, value)


def bare_ids(records: Iterable[Record]) -> dict[tuple[Bond, str], set[str]]:
    """Lesion and patient ids that mean something in their own dataset alone: in which they are."""
    found: dict[tuple[Bond, str], set[str]] = {}
    bonds: tuple[Bond, ...] = ("lesion", "patient")
    for record in records:
        for bond in bonds:
            key = key_of(record, bond)
            if key is not None and len(key) == 3:
                found.setdefault((bond, key[2]), set()).add(key[1])
    return found


def names_of(records: Sequence[Record], labels: NDArray[np.int32]) -> list[str]:
    """The name of each record's component: its smallest image id (with dataset, if not ISIC's)."""
    names: dict[int, str] = {}
    numbers = labels.tolist()
    for record, label in zip(records, numbers, strict=True):
        name = isic_id(record.image) or f"{record.dataset}/{record.image}"
        names[label] = min(names.get(label, name), name)
    return [names[label] for label in numbers]


def linked(manifests: Iterable[tuple[Hashable, Sequence[Record]]]) -> list[tuple[int, int]]:
    """Positions of records that their manifests have put in one component.

    Args:
        manifests: Where each is from, and its records; positions are in all of them together.
            A component that is named by an ISIC id is the same in every manifest.
    """
    first: dict[Hashable, int] = {}
    pairs = []
    rows = ((where, record) for where, records in manifests for record in records)
    for row, (where, record) in enumerate(rows):
        if record.component:
            key = isic_id(record.component) or (where, record.component)
            pairs.append((first.setdefault(key, row), row))
    return pairs


def with_components(records: Sequence[Record]) -> list[Record]:
    """The records, all with components: what a manifest links stays, and ids link the others."""
    names = names_of(records, components(records, linked([("", records)])))
    given = {record.component for record in records}
    if "" not in given and len(given) == len(set(names)):
        return list(records)  # ids link no more than the manifest does
    return [replace(r, component=name) for r, name in zip(records, names, strict=True)]


def shared(records: Sequence[Record], split: Split, with_splits: Collection[Split]) -> int:
    """Number of images of a split that are in one component with an image of others."""
    linked = with_components(records)
    theirs = {record.component for record in linked if record.split in with_splits}
    return sum(record.component in theirs for record in linked if record.split is split)
