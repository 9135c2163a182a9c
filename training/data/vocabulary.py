"""The words of the canonical manifest, and which of them ISIC's many spellings mean."""

import re
from dataclasses import dataclass
from enum import StrEnum


class Site(StrEnum):
    """Anatomical site, in the vocabulary of ISIC 2020 (`anatom_site_general_challenge`)."""

    HEAD_NECK = "head/neck"
    UPPER_EXTREMITY = "upper extremity"
    LOWER_EXTREMITY = "lower extremity"
    TORSO = "torso"
    PALMS_SOLES = "palms/soles"
    ORAL_GENITAL = "oral/genital"


class Sex(StrEnum):
    """Sex as recorded."""

    FEMALE = "female"
    MALE = "male"


class Diagnosis(StrEnum):
    """The seven classes of HAM10000 (Tschandl et al. 2018), and ISIC 2019's eighth."""

    AKIEC = "actinic keratosis"
    BCC = "basal cell carcinoma"
    BKL = "benign keratosis"
    DF = "dermatofibroma"
    MEL = "melanoma"
    NV = "nevus"
    VASC = "vascular lesion"
    SCC = "squamous cell carcinoma"


class Split(StrEnum):
    """What an image may be used for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    EXCLUDED = "excluded"


# As people's tables and folders have them.
SPLITS = {
    **{split.value: split for split in Split},
    **dict.fromkeys(("val", "valid", "dev"), Split.VALIDATION),
    "training": Split.TRAIN,
    "testing": Split.TEST,
}

# What a network is fitted, stopped or calibrated by.
LEARNED = (Split.TRAIN, Split.VALIDATION)


SEXES = {"female": Sex.FEMALE, "f": Sex.FEMALE, "male": Sex.MALE, "m": Sex.MALE}

SITES = {
    **{site.value: site for site in Site},
    # ISIC's `anatom_site_general`
    "anterior torso": Site.TORSO,
    "lateral torso": Site.TORSO,
    "posterior torso": Site.TORSO,
    # HAM10000's `localization`
    "abdomen": Site.TORSO,
    "acral": Site.PALMS_SOLES,
    "back": Site.TORSO,
    "chest": Site.TORSO,
    "ear": Site.HEAD_NECK,
    "face": Site.HEAD_NECK,
    "foot": Site.LOWER_EXTREMITY,
    "genital": Site.ORAL_GENITAL,
    "hand": Site.UPPER_EXTREMITY,
    "neck": Site.HEAD_NECK,
    "scalp": Site.HEAD_NECK,
    "trunk": Site.TORSO,
}

ONE_ZERO = {"1": True, "1.0": True, "0": False, "0.0": False}
TRUTHS = {
    **ONE_ZERO,
    **dict.fromkeys(("true", "yes", "malignant", "melanoma", "mel"), True),
    **dict.fromkeys(("false", "no", "benign", "not melanoma", "oth"), False),
}

_DIAGNOSES: dict[str, Diagnosis | None] = {
    **{diagnosis.value: diagnosis for diagnosis in Diagnosis},
    # The short names of HAM10000 and of ISIC 2019's columns
    "ak": Diagnosis.AKIEC,
    "akiec": Diagnosis.AKIEC,
    "bcc": Diagnosis.BCC,
    "bkl": Diagnosis.BKL,
    "df": Diagnosis.DF,
    "mel": Diagnosis.MEL,
    "nv": Diagnosis.NV,
    "scc": Diagnosis.SCC,
    "vasc": Diagnosis.VASC,
    # As HAM10000's authors spell them out
    "actinic keratosis and intraepithelial carcinoma": Diagnosis.AKIEC,
    "benign keratosis like lesion": Diagnosis.BKL,
    # ISIC's `diagnosis`, and `diagnosis_3` of its newer tables
    "angiokeratoma": Diagnosis.VASC,
    "angioma": Diagnosis.VASC,
    "hemangioma": Diagnosis.VASC,
    "lichen planus like keratosis": Diagnosis.BKL,
    "lichenoid keratosis": Diagnosis.BKL,
    "pigmented benign keratosis": Diagnosis.BKL,
    "pyogenic granuloma": Diagnosis.VASC,
    "seborrheic keratosis": Diagnosis.BKL,
    "solar lentigo": Diagnosis.BKL,
    "solar or actinic keratosis": Diagnosis.AKIEC,
    # HAM10000 counts Bowen's disease among its actinic keratoses.
    "squamous cell carcinoma in situ": Diagnosis.AKIEC,
    "bowen's disease": Diagnosis.AKIEC,
    "bowens disease": Diagnosis.AKIEC,
    "lentigo maligna": Diagnosis.MEL,
    # Known, and none of the eight
    "atypical melanocytic proliferation": None,
    "cafe au lait macule": None,
    "lentigo nos": None,
    "other": None,
}
# What is not said to be so, or not for certain.
_DENIED = re.compile(
    r"\?|\b(non|not|no|without|melanoma free|neg|negative|rul(?:ed?|ing) out|r/o|versus|vs|rather|"
    r"susp|suspect|suspected|suspicion|"
    r"suspicious|poss|possible|possibly|probable|probably|likely|unlikely|presumed|questionable|"
    r"doubtful|suggestive|concern|concerning|query|excl|exclude|excludes|excluded|excluding|dd|"
    r"ddx|differential|history|hx|like|mimic\w*|resembl\w*|simulat\w*)\b"
)
# What a melanoma came of is no second diagnosis.
_ORIGIN = re.compile(
    r"\b(arising|developing) (in|from|within) (an? )?(\w+ )?nevus|\bnevus associated"
)
# In the plural, and in Europe.
_SPELLED = {
    r"\bna?ev(us|i)\b": "nevus",
    r"keratoses\b": "keratosis",
    r"\blentigines\b": "lentigo",
    r"\bseborrhoeic\b": "seborrheic",
    r"\bhaemangioma": "hemangioma",
}
# Names that other words hold: "df", "scc".
_SHORT = 5
# Finer terms than the eight, by words that only they contain ("Melanoma in situ, NOS").
_CONTAINED = {
    "squamous cell carcinoma in situ": Diagnosis.AKIEC,
    "melanoma": Diagnosis.MEL,
    "nevus": Diagnosis.NV,
    "basal cell carcinoma": Diagnosis.BCC,
    "squamous cell carcinoma": Diagnosis.SCC,
}


@dataclass(frozen=True, slots=True)
class Term:
    """What a diagnosis in words means.

    Attributes:
        diagnosis: One of the eight, None where it is none of them.
        melanoma: Whether it is melanoma; None where the words do not tell.
        known: Whether the words are in the vocabulary at all.
    """

    diagnosis: Diagnosis | None
    melanoma: bool | None
    known: bool = True


def diagnosis_of(words: str) -> Term:
    """Understand a diagnosis as ISIC's tables spell it, in any case, or many of them."""
    text = re.sub(r"[\s_-]+", " ", words.strip().lower())
    for spelled, singular in _SPELLED.items():
        text = re.sub(spelled, singular, text)
    if found := _DIAGNOSES.get(text) or _DIAGNOSES.get(text.removesuffix("s")):
        return Term(found, found is Diagnosis.MEL)
    if text in _DIAGNOSES:
        return Term(None, None)
    text = text.replace("not otherwise specified", "nos")
    if _DENIED.search(text):
        return Term(None, None, known=False)
    text = _ORIGIN.sub("", text)
    named = set[Diagnosis]()
    for part, diagnosis in _CONTAINED.items():
        text, count = re.subn(rf"\b{part}s?\b", "", text)
        if count:
            named.add(diagnosis)
    others = {
        diagnosis
        for term, diagnosis in _DIAGNOSES.items()
        if len(term) > _SHORT and diagnosis and re.search(rf"\b{re.escape(term)}s?\b", text)
    }
    if len(named) != 1 or others - named:  # "nevus / melanoma" does not say which
        return Term(None, None, known=False)
    (only,) = named
    return Term(only, only is Diagnosis.MEL)
