"""Where each dataset comes from, and on what terms: what a bundle says of its weights."""

from dataclasses import dataclass

from training.data import ham10000, isic_cli


@dataclass(frozen=True, slots=True)
class Origin:
    """The terms of a dataset, and where it is published."""

    licence: str
    url: str


ORIGINS = {
    ham10000.NAME: Origin("CC BY-NC 4.0", "https://doi.org/10.7910/DVN/DBW86T"),
    isic_cli.ISIC_2017: Origin("CC BY-NC", "https://challenge.isic-archive.com/data/#2017"),
}
