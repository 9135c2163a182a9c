"""Bill's balanced set, the paper's benchmark and test set: `{train,val}/{mel,oth}` and metadata."""

import re
from pathlib import Path

from training.data.manifest import DataError, Diagnosis, Record, Sex, Site
from training.data.tables import read_rows

NAME = "balanced"
VALIDATION_TABLE = "valid-set-metadata.csv"

_DIAGNOSES: dict[str, Diagnosis | None] = {
    "actinic keratosis": Diagnosis.AKIEC,
    "atypical melanocytic proliferation": None,
    "basal cell carcinoma": Diagnosis.BCC,
    "dermatofibroma": Diagnosis.DF,
    "lichenoid keratosis": Diagnosis.BKL,
    "melanoma": Diagnosis.MEL,
    "nevus": Diagnosis.NV,
    "pigmented benign keratosis": Diagnosis.BKL,
    "seborrheic keratosis": Diagnosis.BKL,
    "solar lentigo": Diagnosis.BKL,
    # HAM10000 has no class of its own for invasive squamous cell carcinoma.
    "squamous cell carcinoma": None,
    "vascular lesion": Diagnosis.VASC,
}
_SITES: dict[str, Site | None] = {
    "anterior torso": Site.TORSO,
    "lateral torso": Site.TORSO,
    "posterior torso": Site.TORSO,
    **{site.value: site for site in Site},
}
_SEXES: dict[str, Sex | None] = {sex.value: sex for sex in Sex}
_COLUMNS = {"image", "isic_id", "class", "lesion_id", "sex", "age_approx", "anatom_site_general"}
_ID = re.compile(r"ISIC_\d{7}")


def read_validation_table(folder: Path) -> list[Record]:
    """All rows of the validation metadata, with or without pixels on disk (path "").

    Raises:
        DataError: The metadata does not fit.
    """
    pixels = {
        path.name: path for path in (folder / "train_balanced_224x224" / "val").glob("*/*.jpg")
    }
    records = []
    for row in read_rows(folder / VALIDATION_TABLE, _COLUMNS | {"diagnosis"}):
        image, label = row.text("isic_id"), row.text("class")
        if image is None or not _ID.fullmatch(image):
            raise row.error("isic_id", "an ISIC image id")
        if label not in ("0", "1"):
            raise row.error("class", "0 or 1")
        records.append(
            Record(
                image=image,
                path=str(pixels.get(row.text("image") or "", "")),
                dataset=f"{NAME} ({(row.text('image') or '')[:8]})",
                lesion=row.text("lesion_id"),
                melanoma=label == "1",
                diagnosis=row.choice("diagnosis", _DIAGNOSES),
                age=row.age("age_approx"),
                sex=row.choice("sex", _SEXES),
                site=row.choice("anatom_site_general", _SITES),
            )
        )
    if not records:
        raise DataError(f"{folder / VALIDATION_TABLE} has no rows.")
    return records
