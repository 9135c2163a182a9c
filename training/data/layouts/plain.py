"""A plain CSV: a column that names the image, and columns with any of the labels."""

from collections import Counter

from training.data.layouts import Place, challenge_split, image_of, name_of
from training.data.manifest import COLUMNS, Record, isic_id
from training.data.tables import Faults, Row, read_rows
from training.data.vocabulary import SEXES, SITES, SPLITS, TRUTHS, diagnosis_of

TITLE = "plain CSV"
LICENCE = "that of its owner"
URL = ""
ORDER = 1
_PATH = ("path", "file", "filename", "file_name", "image_path")
_IMAGE = ("image", "image_id", "image_name", "id", *_PATH)
_MELANOMA = ("melanoma", "target", "label", "class", "benign_malignant")
_AGE = ("age", "age_approx", "age_approximate", "age_years", "age_(years)")
_SEX = ("sex", "gender")
_SITE = (
    "site",
    "anatom_site_general_challenge",
    "anatom_site_general",
    "anatomical_site",
    "localization",
    "location",
)
_LESION = ("lesion", "lesion_id")
_PATIENT = ("patient", "patient_id")
_DIAGNOSIS = ("diagnosis", "dx")
_LABELS = (*_MELANOMA, *_DIAGNOSIS, *_AGE, *_SEX, *_SITE)
_READ = {*_IMAGE, *_LABELS, *_LESION, *_PATIENT, "dataset", "split"}


def recognise(place: Place) -> bool:
    """By an image column and a label column, of any of the usual names."""
    return any(_is_table(header, place) for header in place.tables.values())


def read(place: Place, faults: Faults) -> list[Record]:
    """Read every such table; paths are relative to it."""
    records = []
    for table, header in place.tables.items():
        if _is_table(header, place):
            if unread := sorted(header - _READ - {""}):
                faults.add(
                    "unread column",
                    f"{table}: nothing is read of {', '.join(unread)} (docs/data.md names the "
                    "columns that are read).",
                    fatal=False,
                )
            rows = list(read_rows(table, set(), faults))
            images = [_image(row) for row in rows]
            times = Counter(images)
            for row, image in zip(rows, images, strict=True):
                if image is None:
                    continue
                if times[image] > 1:  # pieces of one picture, say, which have names of their own
                    image = image_of(row, *_IMAGE) or image
                records.append(_record(row, image, place))
    return records


def _is_table(header: frozenset[str], place: Place) -> bool:
    # A manifest, or a table of predictions, that lies about is no data of its own.
    return (
        not set(COLUMNS) <= header
        and (place.alone or not {"melanoma_logit", "melanoma_probability"} & header)
        and any(name in header for name in _IMAGE)
        and any(name in header for name in _LABELS)
    )


def _image(row: Row) -> str | None:
    """The image, by its ISIC id where any of the columns holds one."""
    cells = (cell for column in _IMAGE if (cell := row.text(column)))
    ids = (name for cell in cells if isic_id(name := name_of(cell)))
    return next(ids, None) or image_of(row, *_IMAGE)


def _record(row: Row, image: str, place: Place) -> Record:
    term = row.diagnosis(*_DIAGNOSIS)
    said = (row.text(*_MELANOMA) or "").lower()
    called = diagnosis_of(said)
    if called.known:  # a `label` of `nv`, or of `mel`
        melanoma = called.melanoma
        term = term if row.text(*_DIAGNOSIS) else called
    else:
        melanoma = row.choice(TRUTHS, *_MELANOMA)
    if said == "malignant" and row.text(*_DIAGNOSIS):
        melanoma = None  # a carcinoma is malignant, and no melanoma: the diagnosis tells
    named = next((c for name in _IMAGE if (c := row.text(name)) and _is_path(name, c)), None)
    path = place.folder / named.replace("\\", "/") if named else None
    if path and not path.is_file():
        row.faults.add(
            "missing file", f"{row.where(_IMAGE, named)}: {path} is not there.", fatal=False
        )
    return Record(
        image=image if isic_id(image) else (named or image),
        path=str(path if path.is_file() else "") if path else _picture(row, image, place),
        dataset=row.text("dataset") or place.name,
        lesion=row.identity(*_LESION),
        patient=row.identity(*_PATIENT),
        melanoma=term.melanoma if melanoma is None else melanoma,
        diagnosis=term.diagnosis,
        age=row.age(*_AGE),
        sex=row.word(SEXES, *_SEX),
        site=row.word(SITES, *_SITE),
        # No guess: a test image may be among them.
        split=row.choice(SPLITS, "split") or challenge_split(row.path),
    )


def _picture(row: Row, image: str, place: Place) -> str:
    """The path of the one picture that is called so."""
    if isic_id(image) and (picture := place.picture(image)):  # other files of that name are copies
        return picture
    cells = [cell for column in _IMAGE if (cell := row.text(column))]
    cell = next((cell for cell in cells if name_of(cell) in place.pictures), cells[0])
    found = place.pictures.get(name_of(cell), [])
    found = [path for path in found if path.name == cell] or found
    if len(found) > 1:
        row.faults.add(
            "ambiguous name",
            f"{row.where(_IMAGE, cell)}: {found[0]} and {found[1]} are both called {image}. Name "
            "the image by its path, relative to the table.",
        )
    return str(found[0]) if found else ""


def _is_path(column: str, cell: str) -> bool:
    return column in _PATH or "/" in cell or "\\" in cell
