"""The manifest is read back as it was written; its fingerprint is of what can be learned."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.manifest import (
    DataError,
    Record,
    fingerprint,
    isic_id,
    load_manifest,
    save_manifest,
)
from training.data.vocabulary import Diagnosis, Sex, Site, Split, diagnosis_of

words = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), min_size=1)
records = st.builds(
    Record,
    image=words,
    path=words,
    dataset=words,
    lesion=st.none() | words,
    patient=st.none() | words,
    melanoma=st.none() | st.booleans(),
    diagnosis=st.none() | st.sampled_from(Diagnosis),
    age=st.none() | st.floats(0, 120),
    sex=st.none() | st.sampled_from(Sex),
    site=st.none() | st.sampled_from(Site),
    split=st.none() | st.sampled_from(Split),
    component=words,
)


@given(st.lists(records, max_size=5, unique_by=lambda record: (record.dataset, record.image)))
def test_a_manifest_is_read_back_as_it_was(tmp_path_factory, written: list[Record]) -> None:
    path = tmp_path_factory.mktemp("manifest") / "manifest.csv"
    save_manifest(path, written)
    assert load_manifest(path) == written


def test_every_column_is_read_back(tmp_path: Path) -> None:
    full = Record("a", "a.jpg", "d", "l", "p", True, Diagnosis.MEL, 50.0, Sex.MALE, Site.TORSO)
    full = replace(full, split=Split.TEST, component="c")
    assert all(asdict(full).values())
    save_manifest(tmp_path / "manifest.csv", [full])
    assert load_manifest(tmp_path / "manifest.csv") == [full]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_spreadsheet_may_have_saved_it_again(
    tmp_path: Path, encoding: str, delimiter: str
) -> None:
    path = tmp_path / "manifest.csv"
    written = [Record("a", "Müller/a.jpg", "d", melanoma=True), Record("b", "b.jpg", "d")]
    save_manifest(path, written)
    text = path.read_text(encoding="utf-8").replace(",", delimiter)
    path.write_text(text, encoding=encoding)
    assert load_manifest(path) == written


def test_a_manifest_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    with pytest.raises(DataError, match="Write it with `mmtl-train prepare`"):
        load_manifest(path)
    save_manifest(path, [Record("a", "a.jpg", "d")])
    path.write_text(path.read_text() + "b,b.jpg,d,,,,wart,,,,,\n")
    with pytest.raises(DataError, match=r"row 3: 'wart' is none of actinic keratosis, basal"):
        load_manifest(path)
    save_manifest(path, [Record("a", "a.jpg", "d")])
    path.write_text(path.read_text() + "b,b.jpg\n")
    with pytest.raises(DataError, match="row 3: it has more or fewer cells"):
        load_manifest(path)
    save_manifest(path, [Record("a", "a.jpg", "d")])
    whole = path.read_text()
    for cells, sentence in (
        ("b,b.jpg,d,,,7,,,,,,", "melanoma is 1, 0 or empty, not '7'"),
        ("b,b.jpg,d,,,,,nan,,,,", "'nan' is not an age in years"),
        (",b.jpg,d,,,,,,,,,", "row 3: it names no image"),
        ("b,b.jpg,,,,,,,,,,", "row 3: it names no dataset"),
        ("a,b.jpg,d,,,,,,,,,", "the image a of d stands in 2 rows"),
        ("b,\udcf6.jpg,k\udcf6ln,,,,,,,,,", "row 3: it is not in UTF-8"),
    ):
        path.write_text(f"{whole}{cells}\n", errors="surrogateescape")
        with pytest.raises(DataError, match=sentence):
            load_manifest(path)
    path.write_text("image\na\n")
    with pytest.raises(DataError, match="expected the columns"):
        load_manifest(path)


def test_the_fingerprint_is_of_labels_and_splits_not_of_paths_or_order() -> None:
    one, two = Record("a", "a.jpg", "d", melanoma=True), Record("b", "b.jpg", "d")
    same = fingerprint([one, two])
    assert fingerprint([two, replace(one, path="elsewhere.jpg")]) == same
    assert fingerprint([replace(one, melanoma=False), two]) != same
    assert fingerprint([replace(one, split=Split.TEST), two]) != same


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("ISIC_0000001", "ISIC_0000001"),
        ("isic_0000001_downsampled.jpg", "ISIC_0000001"),
        ("ISIC2019_0025105_mel.jpg", "ISIC_0025105"),
        ("melanoma_10105.jpg", None),
        ("ISIC_00000012", None),
    ],
)
def test_an_isic_id_is_found_in_the_names_that_copies_have(name: str, image: str | None) -> None:
    assert isic_id(name) == image


@pytest.mark.parametrize(
    ("said", "diagnosis", "melanoma", "known"),
    [
        ("Melanoma in situ, Lentigo maligna type", Diagnosis.MEL, True, True),
        ("Blue nevus", Diagnosis.NV, False, True),
        ("LENTIGO NOS", None, None, True),
        ("Squamous cell carcinoma in situ", Diagnosis.AKIEC, False, True),
        ("Squamous cell carcinoma in situ, Bowens disease", Diagnosis.AKIEC, False, True),
        ("Bowen's disease", Diagnosis.AKIEC, False, True),
        ("Melanoma, not otherwise specified", Diagnosis.MEL, True, True),
        ("Squamous cell carcinoma, Invasive", Diagnosis.SCC, False, True),
        ("wart", None, None, False),
        ("Non-melanoma", None, None, False),
        ("rule out melanoma", None, None, False),
        ("Nonmelanoma skin cancer", None, None, False),
        ("Pseudomelanoma", None, None, False),
        ("Recurrent nevus (pseudomelanoma)", Diagnosis.NV, False, True),
        ("melanoma?", None, None, False),
        ("suspicious for melanoma", None, None, False),
        ("nevus; melanoma excluded", None, None, False),
        ("r/o melanoma", None, None, False),
        ("DD melanoma", None, None, False),
        ("history of melanoma", None, None, False),
        ("melanoma unlikely", None, None, False),
        ("negative for melanoma", None, None, False),
        ("cannot rule-out melanoma", None, None, False),
        ("melanoma-like nevus", None, None, False),
        ("Melanoma Invasive", Diagnosis.MEL, True, True),
        ("malignant_melanoma", Diagnosis.MEL, True, True),
        ("melanomas", Diagnosis.MEL, True, True),
        ("Nevus, Atypical, Dysplastic, or Clark", Diagnosis.NV, False, True),
        ("Lentigo maligna", Diagnosis.MEL, True, True),
        ("Benign keratosis-like lesions", Diagnosis.BKL, False, True),
        ("Actinic keratoses and intraepithelial carcinoma", Diagnosis.AKIEC, False, True),
        ("actinic_keratoses", Diagnosis.AKIEC, False, True),
        ("Vascular lesions", Diagnosis.VASC, False, True),
        ("Seborrhoeic keratoses", Diagnosis.BKL, False, True),
        ("Lichen planus like keratosis", Diagnosis.BKL, False, True),
        ("Solar lentigines", Diagnosis.BKL, False, True),
        ("Dermatofibromas", Diagnosis.DF, False, True),
        ("Haemangioma", Diagnosis.VASC, False, True),
        ("nevus-like melanoma", None, None, False),
        ("others", None, None, False),
        ("melanoma / hemangiomas", None, None, False),
        ("Melanoma in situ, NOS", Diagnosis.MEL, True, True),
        ("Melanoma arising in a nevus", Diagnosis.MEL, True, True),
        ("nevus-associated melanoma", Diagnosis.MEL, True, True),
        ("Melanoma, margins free", Diagnosis.MEL, True, True),
        *(
            (said, None, None, False)
            for said in (
                "melanoma: neg",
                "melanoma free",
                "nevus mimicking melanoma",
                "SK resembling melanoma",
                "nevus rather than melanoma",
                "ruling out melanoma",
                "nevus; melanoma excl.",
                "nevus or melanoma",
                "nevus / melanoma",
                "seborrheic keratosis or melanoma",
                "solar lentigo / melanoma",
                "nevus / dermatofibroma",
            )
        ),
    ],
)
def test_a_diagnosis_in_words_is_understood(said, diagnosis, melanoma, known) -> None:
    term = diagnosis_of(said)
    assert (term.diagnosis, term.melanoma, term.known) == (diagnosis, melanoma, known)
