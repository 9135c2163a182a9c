"""Where each dataset comes from, and on what terms: what a bundle says of its weights."""

from dataclasses import dataclass

from training.data.layouts import ham10000, isic_cli, load_layouts
from training.data.manifest import collection_of


@dataclass(frozen=True, slots=True)
class Origin:
    """The terms of a dataset, and where it is published."""

    licence: str
    url: str


# Datasets that have no layout of their own.
_PUBLISHED = {
    "isic2017": Origin("CC BY-NC", "https://challenge.isic-archive.com/data/#2017"),
    ham10000.ISIC_2018: Origin(ham10000.LICENCE, ham10000.URL),
}


def origin_of(dataset: str, of_archive: float = 0.0) -> Origin:
    """What is known of a dataset by the name that its records carry.

    Args:
        dataset: The name.
        of_archive: The share of its images that are the ISIC archive's, whose terms go for those
            that were downloaded into a folder of any name.
    """
    if dataset in _PUBLISHED:
        return _PUBLISHED[dataset]
    for layout in load_layouts():
        if collection_of(dataset) == layout.TITLE:
            return Origin(layout.LICENCE, layout.URL)
    if of_archive == 1:
        return Origin(isic_cli.LICENCE, isic_cli.URL)
    if of_archive:
        return Origin(f"as its owner says; of the ISIC archive's, {isic_cli.LICENCE}", "")
    return Origin("as its owner says", "")
