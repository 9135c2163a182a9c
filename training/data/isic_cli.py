"""A folder as `isic-cli` writes it: images beside a `metadata.csv`. ISIC 2017 is one."""

from pathlib import Path

from training.data.manifest import DataError, Diagnosis, Record, Sex, Site
from training.data.tables import read_rows

ISIC_2017 = "ISIC2017"

_DIAGNOSES: dict[str, Diagnosis | None] = {
    "melanoma": Diagnosis.MEL,
    "nevus": Diagnosis.NV,
    "seborrheic keratosis": Diagnosis.BKL,
}
_SITES: dict[str, Site | None] = {
    "anterior torso": Site.TORSO,
    "lateral torso": Site.TORSO,
    "posterior torso": Site.TORSO,
    **{site.value: site for site in Site},
}
_SEXES: dict[str, Sex | None] = {sex.value: sex for sex in Sex}
_COLUMNS = {"isic_id", "age_approx", "sex", "anatom_site_general", "lesion_id", "diagnosis"}


def read(folder: Path, name: str) -> list[Record]:
    """Read a folder that `isic-cli image download` wrote.

    Args:
        folder: With `metadata.csv`.
        name: Of the dataset.

    Raises:
        DataError: The metadata does not fit, or an image that it names is not there.
    """
    table = folder / "metadata.csv"
    records = []
    for row in read_rows(table, _COLUMNS):
        image = row.text("isic_id")
        path = folder / f"{image}.jpg"
        if image is None or not path.is_file():
            raise DataError(f"{table}, row {row.number}: the image {path} is not there.")
        diagnosis = row.choice("diagnosis", _DIAGNOSES)
        records.append(
            Record(
                image=image,
                path=str(path),
                dataset=name,
                lesion=row.text("lesion_id"),
                melanoma=None if diagnosis is None else diagnosis is Diagnosis.MEL,
                diagnosis=diagnosis,
                age=row.age("age_approx"),
                sex=row.choice("sex", _SEXES),
                site=row.choice("anatom_site_general", _SITES),
            )
        )
    return records
