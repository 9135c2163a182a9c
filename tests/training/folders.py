"""Small drawn copies of the datasets' layouts."""

import csv
from pathlib import Path

from tests.lesions import lesion

DIAGNOSES = ("nv", "nv", "mel", "bkl", "bcc", "nv", "mel", "akiec", "df", "vasc")
SITES = ("back", "face", "hand", "foot", "acral", "genital", "unknown")


def draw_ham10000(folder: Path, lesions: int = 60) -> Path:
    """A HAM10000 of two images a lesion."""
    images = folder / "HAM10000_images"
    images.mkdir(parents=True)
    rows = []
    for number in range(lesions):
        diagnosis = DIAGNOSES[number % len(DIAGNOSES)]
        for copy in range(2):
            name = f"ISIC_{2 * number + copy:07d}"
            picture = lesion(1000 * number + copy, 40, 30, diagnosis == "mel")
            (images / f"{name}.jpg").write_bytes(picture)
            rows.append(
                {
                    "lesion_id": f"HAM_{number:07d}",
                    "image_id": name,
                    "dx": diagnosis,
                    "dx_type": "histo",
                    "age": str(5.0 * (number % 18)) if number % 9 else "",
                    "sex": ("male", "female", "unknown")[number % 3],
                    "localization": SITES[number % len(SITES)],
                }
            )
    write_table(folder / "HAM10000_metadata.csv", rows)
    return folder


def draw_balanced(folder: Path, ham: Path) -> Path:
    """A balanced set that holds two of HAM10000's images, and one row without pixels."""
    rows = []
    for name, label in (("ISIC_0000004", 1), ("ISIC_0000010", 0), ("ISIC_9999999", 0)):
        end = "mel" if label else "oth"
        file = f"ISIC2019_{name[5:]}_{end}.jpg"
        source = ham / "HAM10000_images" / f"{name}.jpg"
        if source.is_file():
            target = folder / "train_balanced_224x224" / "val" / end / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        rows.append(
            {
                "image": file,
                "isic_id": name,
                "class": str(label),
                "lesion_id": f"IL_{name[-3:]}",
                "sex": "male",
                "age_approx": "55.0",
                "anatom_site_general": "anterior torso",
                "diagnosis": "melanoma" if label else "nevus",
            }
        )
    write_table(folder / "valid-set-metadata.csv", rows)
    return folder


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
