"""Small drawn copies of every dataset layout that users have."""

import csv
from collections.abc import Callable
from pathlib import Path

from tests.lesions import lesion
from tests.training.folders import draw_balanced, draw_ham10000, write_table

ROWS = 6


def picture(path: Path, seed: int, melanoma: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lesion(seed, 40, 30, melanoma))


def isic(number: int) -> str:
    return f"ISIC_{number:07d}"


def draw_isic2020_kaggle(folder: Path) -> Path:
    rows = []
    for number in range(ROWS):
        picture(folder / "jpeg" / "train" / f"{isic(number)}.jpg", number, number == 0)
        rows.append(
            {
                "image_name": isic(number),
                "patient_id": f"IP_{number // 2:07d}",
                "sex": ("male", "female", "")[number % 3],
                "age_approx": "45.0",
                "anatom_site_general_challenge": ("torso", "", "head/neck")[number % 3],
                "diagnosis": "melanoma" if number == 0 else "unknown",
                "benign_malignant": "malignant" if number == 0 else "benign",
                "target": str(int(number == 0)),
            }
        )
    write_table(folder / "train.csv", rows)
    return folder / "train.csv"


def draw_isic2020_official(folder: Path) -> Path:
    """v2 with lesion ids, the listed duplicates, resized PNG copies, and the test table."""
    with draw_isic2020_kaggle(folder).open() as file:
        rows = list(csv.DictReader(file))
    (folder / "train.csv").unlink()
    for path in (folder / "jpeg" / "train").iterdir():
        path.unlink()
    for number, row in enumerate(rows):
        row["lesion_id"] = f"IL_{number // 2:07d}"
        picture(folder / "resized_128" / f"{row['image_name']}.png", number)
    write_table(folder / "ISIC_2020_Training_GroundTruth_v2.csv", rows)
    pairs = [{"image_name_1": isic(0), "image_name_2": isic(5)}]
    write_table(folder / "ISIC_2020_Training_Duplicates.csv", pairs)
    test = [
        {
            "image": isic(90),
            "patient": "IP_0000009",
            "sex": "male",
            "age_approx": "70.0",
            "anatom_site_general": "torso",
        }
    ]
    write_table(folder / "ISIC_2020_Test_Metadata.csv", test)
    return folder / "ISIC_2020_Training_GroundTruth_v2.csv"


def draw_isic2019(folder: Path) -> Path:
    classes = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
    truth, metadata = [], []
    for number in range(len(classes)):
        name = isic(number) + ("_downsampled" if number == 1 else "")
        picture(folder / "ISIC_2019_Training_Input" / f"{name}.jpg", number, number == 0)
        truth.append({"image": name} | {c: f"{float(c == classes[number])}" for c in classes})
        metadata.append(
            {
                "image": name,
                "age_approx": "55" if number else "",
                "anatom_site_general": "anterior torso",
                "lesion_id": f"BCN_{number // 2:07d}",
                "sex": "female",
            }
        )
    write_table(folder / "ISIC_2019_Training_GroundTruth.csv", truth)
    write_table(folder / "ISIC_2019_Training_Metadata.csv", metadata)
    return folder / "ISIC_2019_Training_Metadata.csv"


def draw_isic_cli_old(folder: Path, first: int = 0) -> Path:
    rows = []
    for number in range(first, first + ROWS):
        picture(folder / f"{isic(number)}.jpg", number, number == 0)
        rows.append(
            {
                "isic_id": isic(number),
                "age_approx": "35.0",
                "sex": "male",
                "anatom_site_general": "",
                "lesion_id": f"IL_{number // 2:07d}",
                "diagnosis": ("melanoma", "nevus", "seborrheic keratosis")[number % 3],
                "benign_malignant": "malignant" if number % 3 == 0 else "benign",
            }
        )
    write_table(folder / "metadata.csv", rows)
    return folder / "metadata.csv"


def draw_isic_cli_new(folder: Path) -> Path:
    rows = []
    for number in range(ROWS):
        picture(folder / f"{isic(number)}.jpg", number, number == 0)
        malignant = number % 3 == 0
        rows.append(
            {
                "isic_id": isic(number),
                "attribution": "a clinic",
                "copyright_license": "CC-BY-NC",
                "age_approx": "35",
                "anatom_site_general": "posterior torso",
                "diagnosis_1": "Malignant" if malignant else "Benign",
                "diagnosis_2": "Malignant melanocytic proliferations (Melanoma)"
                if malignant
                else "Benign melanocytic proliferations",
                "diagnosis_3": ("Melanoma in situ", "Nevus", "Cyst")[number % 3],
                "image_type": "clinical: close-up" if number == 5 else "dermoscopic",
                "lesion_id": f"IL_{number // 2:07d}",
                "patient_id": f"IP_{number // 2:07d}",
                "sex": "female",
            }
        )
    write_table(folder / "metadata.csv", rows)
    return folder / "metadata.csv"


def draw_kaggle10k(folder: Path) -> None:
    for number in range(ROWS):
        part, name = ("train", "test")[number % 2], ("benign", "malignant")[number // 3]
        picture(folder / part / name / f"melanoma_{number}.jpg", number, number >= 3)
    for part in ("train", "test"):
        for name in ("benign", "malignant"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)


def draw_class_folders(folder: Path) -> None:
    for number in range(ROWS):
        part, name = ("train", "Val")[number % 2], ("Melanoma", "naevus", "BKL")[number // 2]
        picture(folder / part / name / f"case {number}.png", number, number < 2)


def draw_plain(folder: Path) -> Path:
    rows = []
    for number in range(ROWS):
        picture(folder / "images" / f"clinic-{number}.png", number, number == 0)
        rows.append(
            {
                "file": f"images/clinic-{number}.png",
                "Melanoma": ("yes", "no")[number > 0],
                "age": "61",
                "sex": "F",
                "site": "back",
                "patient": str(number // 2),
            }
        )
    write_table(folder / "labels.csv", rows)
    return folder / "labels.csv"


def draw_ham(folder: Path) -> Path:
    draw_ham10000(folder, 20)
    # As the Dataverse gives it: in two parts, of any size.
    images, part = folder / "HAM10000_images", folder / "HAM10000_images_part_2"
    part.mkdir()
    for path in sorted(images.iterdir())[10:]:
        path.rename(part / path.name)
    images.rename(folder / "HAM10000_images_part_1")
    return folder / "HAM10000_metadata.csv"


def draw_balanced_set(folder: Path) -> Path:
    ham = folder.parent / "ham-for-balanced"
    draw_ham10000(ham, 20)
    draw_balanced(folder, ham)
    return folder / "valid-set-metadata.csv"


# By name: the layout's title, what draws it (and gives the table to tamper with), and the number
# of images with pixels.
LAYOUTS: dict[str, tuple[str, Callable[[Path], Path | None], int]] = {
    "ham10000": ("HAM10000", draw_ham, 40),
    "isic2019": ("ISIC 2019", draw_isic2019, 9),
    "isic2020-kaggle": ("ISIC 2020", draw_isic2020_kaggle, 6),
    "isic2020-official": ("ISIC 2020", draw_isic2020_official, 6),
    "isic-cli-old": ("ISIC archive (isic-cli)", draw_isic_cli_old, 6),
    "isic-cli-new": ("ISIC archive (isic-cli)", draw_isic_cli_new, 5),
    "balanced": ("balanced", draw_balanced_set, 8),
    "kaggle10k": ("Kaggle 10k", draw_kaggle10k, 6),
    "class-folders": ("class folders", draw_class_folders, 6),
    "plain": ("plain CSV", draw_plain, 6),
}
