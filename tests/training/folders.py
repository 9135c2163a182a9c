"""Small drawn copies of the datasets' layouts."""

import csv
from pathlib import Path

from tests.lesions import lesion

DIAGNOSES = ("nv", "nv", "mel", "bkl", "bcc", "nv", "mel", "akiec", "df", "vasc")
# Two in ten of the lesions are melanomas (see DIAGNOSES); of these, half.
BALANCED_LESIONS = [number for number in range(100) if number % 10 in (0, 1, 2, 6)]
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
            # Some look like the other kind: a network that is always right cannot be calibrated.
            malignant = (diagnosis == "mel") != (number % 11 == 0)
            picture = lesion(1000 * number + copy, 40, 30, malignant)
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
    """A balanced set of the first image of some of HAM10000's lesions, and a row without pixels."""
    with (ham / "HAM10000_metadata.csv").open() as file:
        known = {row["image_id"]: row["dx"] for row in csv.DictReader(file)}
    rows = []
    for number in (*BALANCED_LESIONS, 4_999_999):
        name = f"ISIC_{2 * number:07d}"
        label = int(known.get(name) == "mel")
        file_name = f"ISIC{2017 if number == BALANCED_LESIONS[0] else 2019}_{name[5:]}_"
        file_name += "mel.jpg" if label else "oth.jpg"
        if name in known:
            end = "mel" if label else "oth"
            target = folder / "train_balanced_224x224" / "val" / end / file_name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ham / "HAM10000_images" / f"{name}.jpg").read_bytes())
        rows.append(
            {
                "image": file_name,
                "isic_id": name,
                "class": str(label),
                "lesion_id": f"IL_{number:07d}",
                "sex": "male",
                "age_approx": str(20.0 + 5 * (number % 12)),
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
