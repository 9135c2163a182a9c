"""ISIC 2019: a one-hot ground truth, metadata beside it, `_downsampled` names among the images."""

from pathlib import Path

from training.data.layouts import Place, challenge_split, image_of
from training.data.manifest import Record
from training.data.tables import Faults, Row, read_rows
from training.data.vocabulary import ONE_ZERO, SEXES, SITES, Split, Term, diagnosis_of

TITLE = "ISIC 2019"
LICENCE = "CC BY-NC 4.0"
URL = "https://challenge.isic-archive.com/data/#2019"
CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
_CLASSES = tuple(name.lower() for name in CLASSES if name != "UNK")
_TRUTH = ("image", "mel", "nv", "bcc", "ak", "bkl")
_METADATA = ("image", "age_approx", "anatom_site_general", "sex")


def recognise(place: Place) -> bool:
    """By the one-hot columns, or by the metadata's."""
    return bool(place.tables_with(*_TRUTH) or _metadata(place))


def _metadata(place: Place) -> list[Path]:
    """Tables with these columns and no others: other years' have more, labels among them."""
    own = {*_METADATA, "lesion_id"}
    return [table for table in place.tables_with(*_METADATA) if place.tables[table] <= own]


def read(place: Place, faults: Faults) -> list[Record]:
    """Join the two tables by image; either may be missing."""
    terms: dict[str, Term] = {}
    held_out: dict[str, Split] = {}
    for table in place.tables_with(*_TRUTH):
        for row in read_rows(table, {"image", *_CLASSES}, faults):
            image = image_of(row, "image")
            if image is None:
                continue
            if split := challenge_split(table):
                held_out[image] = split
            term = _term(row)
            if terms.setdefault(image, term) != term:
                faults.add(
                    "repeated row",
                    f"{row.where(('image',))}: {image} stands in two rows, which disagree.",
                )
    people: dict[str, Row] = {}
    for table in _metadata(place):
        for row in read_rows(table, set(_METADATA), faults):
            image = image_of(row, "image")
            if image is None:
                continue
            if image in people and people[image].cells != row.cells:
                faults.add(
                    "repeated row",
                    f"{row.where(('image',))}: {image} stands in two rows, which disagree.",
                )
            people[image] = row
            if split := challenge_split(table):
                held_out[image] = split
    records, nobody = [], Row(place.folder, 0, {}, faults)
    for image in {**terms, **people}:
        term, person = terms.get(image, Term(None, None)), people.get(image, nobody)
        records.append(
            Record(
                image=image,
                path=place.picture(image),
                dataset=TITLE,
                lesion=person.identity("lesion_id"),
                melanoma=term.melanoma,
                diagnosis=term.diagnosis,
                age=person.age("age_approx"),
                sex=person.word(SEXES, "sex"),
                site=person.word(SITES, "anatom_site_general"),
                split=held_out.get(image),
            )
        )
    return records


def _term(row: Row) -> Term:
    """The class whose column holds 1."""
    chosen = [name for name in CLASSES if row.choice(ONE_ZERO, name.lower())]
    if len(chosen) != 1:
        row.faults.add(
            "bad value",
            f"{row.where(tuple(name.lower() for name in CLASSES))}: exactly one of the classes "
            f"must be 1; {len(chosen)} are.",
        )
        return Term(None, None)
    return Term(None, None) if chosen[0] == "UNK" else diagnosis_of(chosen[0])
