"""Labels for a bare image folder, joined from metadata by ISIC id: the paper's re-annotation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from training.data.layouts import Dataset, image_files, merge
from training.data.manifest import DataError, Record, isic_id


@dataclass(frozen=True, slots=True)
class Annotation:
    """A folder's images with what could be found of them.

    Attributes:
        records: One an image.
        matched: How many of them some metadata knows.
        unmatched: File names that none does.
        disagreements: Sentences; the first metadata given wins.
    """

    records: list[Record]
    matched: int
    unmatched: list[str]
    disagreements: list[str]


def annotate(folder: Path, own: Sequence[Dataset], metadata: Sequence[Dataset]) -> Annotation:
    """Join a folder's images to metadata.

    Args:
        folder: Of images, named by their ISIC ids.
        own: What the folder itself says, where it has a layout (`{mel,oth}` folders).
        metadata: In order of trust: what an earlier one says is kept, gaps are filled from later.

    Raises:
        DataError: The folder holds no image.
    """
    known: dict[str, list[Record]] = {}
    for dataset in metadata:
        for record in dataset.records:
            known.setdefault(record.image, []).append(record)
    records = [record for dataset in own for record in dataset.records if record.path]
    if not records:
        records = _bare(folder.absolute())
    if not records:
        raise DataError(f"{folder} holds no image files.")
    done, unmatched, disagreements = [], [], []
    for record in records:
        sources = known.get(record.image, []) if isic_id(record.image) else []
        if not sources:
            unmatched.append(Path(record.path).name)
        for source in sources:
            record, differing = _fill(record, source)
            disagreements += [
                f"{record.image}: {name} is {getattr(record, name)} in {record.dataset} and "
                f"before, {getattr(source, name)} in {source.dataset}."
                for name in differing
            ]
        done.append(record)
    return Annotation(done, len(done) - len(unmatched), unmatched, disagreements)


def _bare(folder: Path) -> list[Record]:
    """Images by ISIC id, the file that has no more than that in its name; others by their path."""
    found: dict[str, Record] = {}
    for path in sorted(image_files(folder), key=lambda path: (len(path.stem), path)):
        own = path.relative_to(folder)
        plain = own.with_suffix("").as_posix()
        name = isic_id(path.name) or (own.as_posix() if plain in found else plain)
        found.setdefault(name, Record(name, str(path), folder.name))
    return sorted(found.values(), key=lambda record: record.path)


def _fill(record: Record, source: Record) -> tuple[Record, list[str]]:
    """Fill the record's gaps; what names of lesions and patients are is each dataset's own."""
    labels = replace(source, image=record.image, path=record.path, dataset=record.dataset)
    filled, differing = merge(record, replace(labels, split=None, component=""))
    return filled, [name for name in differing if name not in ("lesion", "patient")]
