"""HAM10000 (Tschandl et al. 2018): `HAM10000_metadata.csv` and one or two folders of images."""

from pathlib import Path

from training.data.manifest import DataError, Diagnosis, Record, Sex, Site
from training.data.tables import read_rows

NAME = "HAM10000"
LICENCE = "CC BY-NC 4.0"
SOURCE = "https://doi.org/10.7910/DVN/DBW86T"

_DIAGNOSES: dict[str, Diagnosis | None] = {
    "akiec": Diagnosis.AKIEC,
    "bcc": Diagnosis.BCC,
    "bkl": Diagnosis.BKL,
    "df": Diagnosis.DF,
    "mel": Diagnosis.MEL,
    "nv": Diagnosis.NV,
    "vasc": Diagnosis.VASC,
}
_SITES: dict[str, Site | None] = {
    "abdomen": Site.TORSO,
    "acral": Site.PALMS_SOLES,
    "back": Site.TORSO,
    "chest": Site.TORSO,
    "ear": Site.HEAD_NECK,
    "face": Site.HEAD_NECK,
    "foot": Site.LOWER_EXTREMITY,
    "genital": Site.ORAL_GENITAL,
    "hand": Site.UPPER_EXTREMITY,
    "lower extremity": Site.LOWER_EXTREMITY,
    "neck": Site.HEAD_NECK,
    "scalp": Site.HEAD_NECK,
    "trunk": Site.TORSO,
    "upper extremity": Site.UPPER_EXTREMITY,
}
_SEXES: dict[str, Sex | None] = {sex.value: sex for sex in Sex}
_COLUMNS = {"lesion_id", "image_id", "dx", "age", "sex", "localization"}


def read(folder: Path) -> list[Record]:
    """Read HAM10000 from `folder`.

    Raises:
        DataError: The metadata does not fit, or an image that it names is not there.
    """
    table = folder / "HAM10000_metadata.csv"
    images = {path.stem: path for path in folder.glob("HAM10000_images*/*.jpg")}
    records = []
    for row in read_rows(table, _COLUMNS):
        image = row.text("image_id")
        if image is None or image not in images:
            raise DataError(
                f"{table}, row {row.number}: the image {image}.jpg is in none of the folders "
                f"{folder}/HAM10000_images*."
            )
        diagnosis = row.choice("dx", _DIAGNOSES)
        records.append(
            Record(
                image=image,
                path=str(images[image]),
                dataset=NAME,
                lesion=row.text("lesion_id"),
                melanoma=None if diagnosis is None else diagnosis is Diagnosis.MEL,
                diagnosis=diagnosis,
                age=row.age("age"),
                sex=row.choice("sex", _SEXES),
                site=row.choice("localization", _SITES),
            )
        )
    return records
