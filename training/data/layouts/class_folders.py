"""A folder a class, as torchvision has them: `CLASS/…` or `{train,val,test}/CLASS/…`."""

from pathlib import Path

from models.files import is_hidden
from training.data.layouts import Place
from training.data.manifest import Record, isic_id
from training.data.tables import Faults
from training.data.vocabulary import SPLITS, TRUTHS, Term, diagnosis_of

TITLE = "class folders"
LICENCE = "that of its owner"
URL = ""
ORDER = 2
_LEAST = 2


def recognise(place: Place) -> bool:
    """By names: more of its folders, or of those of its parts, are classes than are not."""
    if place.alone:
        return False
    parts = [folder for folder in _folders(place.folder) if folder.name.lower() in SPLITS]
    return any(_holds_classes(folder) for folder in (place.folder, *parts))


def read(place: Place, faults: Faults) -> list[Record]:
    """Read the folders; a class is a diagnosis, or says whether it is melanoma (`malignant` is)."""
    records, unknown = [], set[Path]()
    for path in place.files:
        folders = path.relative_to(place.folder).parts[:-1]
        parted = bool(folders) and folders[0].lower() in SPLITS
        part = folders[0] if parted else place.folder.name
        classes = folders[parted:]
        term = _class_of(classes[0]) if classes else None
        if term is None:
            faults.add("stray file", f"{path} is in no folder of a class.", fatal=False)
        elif not term.known:
            unknown.add(place.folder.joinpath(*folders[: parted + 1]))
        else:
            records.append(
                Record(
                    image=isic_id(path.name) or path.relative_to(place.folder).as_posix(),
                    path=str(path),
                    dataset=place.name,
                    melanoma=term.melanoma,
                    diagnosis=term.diagnosis,
                    split=SPLITS.get(part.lower()),
                )
            )
    for folder in sorted(unknown):
        faults.add(
            "unknown class",
            f"{folder}: {folder.name!r} is not a diagnosis that is known here, nor melanoma, "
            "malignant or benign. Rename it, or move it elsewhere.",
        )
    return records


def _folders(folder: Path) -> list[Path]:
    try:
        found = [each for each in folder.iterdir() if not is_hidden(each.name)]
    except OSError:
        return []
    return [each for each in found if each.is_dir()]


def _holds_classes(folder: Path) -> bool:
    known = [_class_of(each.name).known for each in _folders(folder)]
    return sum(known) >= _LEAST and 2 * sum(known) > len(known)


def _class_of(name: str) -> Term:
    """What a folder's name means; numbers mean nothing."""
    term = diagnosis_of(name.replace("_", " "))
    word = name.lower()
    if not term.known and word in TRUTHS and not word.replace(".", "").isdigit():
        return Term(None, TRUTHS[word])
    return term
