"""Kaggle's "Melanoma Skin Cancer Dataset of 10000 Images": `{train,test}/{benign,malignant}`."""

from training.data.layouts import Place, plain
from training.data.manifest import Record, isic_id
from training.data.tables import Faults
from training.data.vocabulary import SPLITS, Split

TITLE = "Kaggle 10k"
LICENCE = "not stated; its images are ISIC's (CC BY-NC)"
URL = "https://www.kaggle.com/datasets/hasnainjaved/melanoma-skin-cancer-dataset-of-10000-images"
_PARTS = {"train": Split.TRAIN, "test": Split.TEST}
_CLASSES = {"benign": False, "malignant": True}


def recognise(place: Place) -> bool:
    """By its folders, of which none is for validation, and by no table: it has none."""
    if place.alone or plain.recognise(place):
        return False
    if any((place.folder / part).is_dir() for part in SPLITS if part not in _PARTS):
        return False
    folders = (place.folder, *(place.folder / part for part in _PARTS))
    return any(all((folder / name).is_dir() for name in _CLASSES) for folder in folders)


def read(place: Place, faults: Faults) -> list[Record]:
    """Read the folders: `malignant` is melanoma here. One without an ISIC id keeps its path."""
    records = []
    for path in place.files:
        part, name = path.parts[-3], path.parts[-2]
        flat = path.parent.parent == place.folder  # the classes alone, wherever they lie
        if name not in _CLASSES or (part not in _PARTS and not flat):
            faults.add("stray file", f"{path} is in none of its folders.", fatal=False)
            continue
        records.append(
            Record(
                image=isic_id(path.name) or "/".join((part, name, path.stem)),
                path=str(path),
                dataset=TITLE,
                melanoma=_CLASSES[name],
                split=_PARTS.get(part),
            )
        )
    return records
