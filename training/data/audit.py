"""Leakage: what two sets of images share, by image, lesion, patient and picture."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.files import write_atomically
from training.data.components import Bond, bare_ids, components, linked
from training.data.layouts import Dataset, name_of
from training.data.manifest import Record, open_table


@dataclass(frozen=True, slots=True)
class Leak:
    """A row of B that A gives away.

    Attributes:
        record: The row.
        partner: A row of A that does, by the first of the reasons.
        reasons: "image", "lesion", "patient", "listed duplicate", "near duplicate", or "chain"
            where only several of these in a row join them.
    """

    record: Record
    partner: Record
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What A gives away of B. Figures without `_a_` count rows of B.

    Attributes:
        rows_a: Rows of A.
        rows_b: Rows of B.
        shared_images: Image ids in both.
        shared_lesions: Lesions with an id and rows in both, whatever each dataset calls them.
        shared_patients: Patients likewise.
        listed_pairs: Pairs that a dataset lists as duplicates, one in A and one in B.
        bare_ids_in_both: Lesion and patient ids that are equal on both sides and were not joined,
            since without the archive's prefix they may mean other lesions (see `same_ids`).
        pictures_compared: Number of pictures; None where that was not asked for.
        near_duplicate_pairs: Pairs found by comparing them, those of one image id aside.
        rows_by_image: Rows whose image is on the other side.
        rows_by_lesion: Rows whose lesion is.
        rows_by_patient: Rows whose patient is.
        rows_by_lesion_or_patient: Either of them.
        rows_by_duplicate: Rows in such a pair.
        rows_by_any: Rows joined by any of these, or by several in a chain.
        rows_a_by_image: The same of A, and so on.
        leaks: Every row of B that is joined to A.
    """

    rows_a: int
    rows_b: int
    shared_images: int
    shared_lesions: int
    shared_patients: int
    listed_pairs: int
    bare_ids_in_both: int
    pictures_compared: int | None
    near_duplicate_pairs: int | None
    rows_by_image: int
    rows_by_lesion: int
    rows_by_patient: int
    rows_by_lesion_or_patient: int
    rows_by_duplicate: int
    rows_by_any: int
    rows_a_by_image: int
    rows_a_by_lesion: int
    rows_a_by_patient: int
    rows_a_by_lesion_or_patient: int
    rows_a_by_duplicate: int
    rows_a_by_any: int
    leaks: list[Leak] = field(default_factory=list, repr=False)

    def figures(self) -> dict[str, int | None]:
        """The counts, for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "leaks"}


def audit(
    first: Sequence[Dataset],
    second: Sequence[Dataset],
    knowing: Sequence[Dataset] = (),
    compare: Callable[[Sequence[Record]], list[tuple[int, int]]] | None = None,
    same_ids: bool = False,
) -> Audit:
    """Look for whatever A (`first`) and B (`second`) share.

    Args:
        first: What is learned from.
        second: What is tested on.
        knowing: Datasets that are in neither, whose tables tell more of the same images: HAM10000
            knows lesions of images that other sets hold without a lesion id.
        compare: Finds near-duplicates among records; None to go by ids alone.
        same_ids: Lesion and patient ids of any form mean the same in every dataset.
    """
    a = [record for dataset in first for record in dataset.records]
    b = [record for dataset in second for record in dataset.records]
    everything = a + b + [record for dataset in knowing for record in dataset.records]
    side = np.array([1] * len(a) + [2] * len(b) + [0] * (len(everything) - len(a) - len(b)))
    listed = [pair for d in (*first, *second, *knowing) for pair in d.pairs]
    pairs = compare(everything[: len(a) + len(b)]) if compare else []
    known_links = linked((tuple(d.place.tables), d.records) for d in (*first, *second, *knowing))

    images = components(everything, by=("image",))
    by_image = _joined(side, images)
    known: dict[Bond, NDArray[np.int32]] = {
        bond: components(everything, by=("image", bond), same_ids=same_ids)
        for bond in ("lesion", "patient")
    }
    joined = {
        bond: _joined(side, labels) & _with_id(everything, labels, bond)
        for bond, labels in known.items()
    }
    in_listed, listed_pairs = _listed_across(everything, side, listed)
    in_near, _ = _across(side, pairs)
    _, near_pairs = _across(side, [pair for pair in pairs if images[pair[0]] != images[pair[1]]])
    whole = components(everything, [*pairs, *known_links], listed, same_ids=same_ids)
    by_any = _joined(side, whole)
    rows = {
        "image": by_image,
        "lesion": joined["lesion"],
        "patient": joined["patient"],
        "lesion_or_patient": joined["lesion"] | joined["patient"],
        "duplicate": in_listed | in_near,
        "any": by_any,
    }
    counts = {
        f"rows_{prefix}by_{name}": int((where & (side == of)).sum())
        for prefix, of in (("", 2), ("a_", 1))
        for name, where in rows.items()
    }

    def shared(bond: Bond) -> int:
        return len(set(known[bond][joined[bond] & (side > 0)].tolist()))

    reasons = {
        "image": by_image,
        "lesion": joined["lesion"],
        "patient": joined["patient"],
        "listed duplicate": in_listed,
        "near duplicate": in_near,
    }
    by_reason: dict[str, NDArray[np.int32]] = {"image": images, "chain": whole}
    by_reason |= {str(bond): labels for bond, labels in known.items()}
    givers = {name: _first_of(side, labels) for name, labels in by_reason.items()}
    in_pair = _partners(side, pairs)

    def leak(row: int) -> Leak:
        why = tuple(reason for reason, where in reasons.items() if where[row]) or ("chain",)
        if why[0] == "near duplicate":
            giver = in_pair[row]
        else:
            name = why[0] if why[0] in givers else "chain"
            giver = givers[name][int(by_reason[name][row])]
        return Leak(everything[row], everything[giver], why)

    leaks = [leak(row) for row in np.flatnonzero((side == 2) & by_any).tolist()]
    return Audit(
        rows_a=len(a),
        rows_b=len(b),
        shared_images=len(set(images[by_image & (side > 0)].tolist())),
        shared_lesions=shared("lesion"),
        shared_patients=shared("patient"),
        listed_pairs=listed_pairs,
        bare_ids_in_both=0 if same_ids else _bare_in_both(a, b),
        pictures_compared=sum(bool(record.path) for record in a + b) if compare else None,
        near_duplicate_pairs=near_pairs if compare else None,
        leaks=leaks,
        **counts,
    )


def save_leaks(path: Path, leaks: Sequence[Leak]) -> None:
    """Write every leaking row of B as CSV, with a row of A that gives it away."""
    with write_atomically(path) as temporary, open_table(temporary) as file:
        writer = csv.writer(file)
        writer.writerow(["image", "dataset", "path", "reasons", "image_a", "dataset_a", "path_a"])
        for leak in leaks:
            row, other = leak.record, leak.partner
            reasons = "; ".join(leak.reasons)
            writer.writerow(
                [row.image, row.dataset, row.path, reasons, other.image, other.dataset, other.path]
            )


def _joined(side: NDArray[np.int64], labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Rows whose component has rows of A and of B."""
    found: NDArray[np.bool_] = np.isin(labels, labels[side == 1]) & np.isin(
        labels, labels[side == 2]
    )
    return found


def _with_id(records: Sequence[Record], labels: NDArray[np.int32], bond: Bond) -> NDArray[np.bool_]:
    """Rows whose component has such an id at all."""
    having = np.array([bool(getattr(record, bond)) for record in records], bool)
    found: NDArray[np.bool_] = np.isin(labels, labels[having])
    return found


def _first_of(side: NDArray[np.int64], labels: NDArray[np.int32]) -> dict[int, int]:
    """The first row of A of each component."""
    found: dict[int, int] = {}
    for position in np.flatnonzero(side == 1).tolist():
        found.setdefault(int(labels[position]), position)
    return found


def _partners(side: NDArray[np.int64], pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """A row of A for each row of B that is paired with one."""
    found: dict[int, int] = {}
    for one, other in pairs:
        for row, giver in ((one, other), (other, one)):
            if side[row] == 2 and side[giver] == 1:
                found.setdefault(row, giver)
    return found


def _bare_in_both(a: Sequence[Record], b: Sequence[Record]) -> int:
    """Lesion and patient ids that are equal on both sides, in datasets of other names."""
    ours, theirs = bare_ids(a), bare_ids(b)
    return sum(not ours[key] & theirs[key] for key in ours.keys() & theirs.keys())


def _across(
    side: NDArray[np.int64], pairs: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.bool_], int]:
    """Rows in a pair of which one is in A and one in B, and the number of such pairs."""
    where = np.zeros(len(side), bool)
    crossing = [pair for pair in pairs if {side[pair[0]], side[pair[1]]} == {1, 2}]
    for pair in crossing:
        where[list(pair)] = True
    return where, len(crossing)


def _listed_across(
    records: Sequence[Record], side: NDArray[np.int64], listed: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.bool_], int]:
    rows: dict[str, list[int]] = {}
    if listed:
        for position, record in enumerate(records):
            rows.setdefault(name_of(record.image), []).append(position)
    pairs = [
        (one, other)
        for first, second in sorted(set(listed))
        for one in rows.get(first, ())
        for other in rows.get(second, ())
    ]
    return _across(side, pairs)
