"""One run of the benchmark: weights, features, what they say, and the cautions that apply."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training import paper
from training.backbones import Source, WeightsError, find_source
from training.benchmark import probes
from training.benchmark.features import Features, Store, extract_all, keys_of, machine, measure_all
from training.benchmark.finetune import finetune
from training.benchmark.probes import Study
from training.benchmark.table import add_finetuned, judge
from training.data.components import with_components
from training.data.layouts import balanced
from training.data.manifest import DataError, Record, fingerprint, first_line
from training.zoo import Backbone

SEED = 0
INTERVAL = (
    "95 %, bootstrap over components within folds, widened by how much more the mean of folds "
    "strays on permuted labels"
)
# Of one that has features in this run, and none that are wanted.
_OTHERS = (
    "Its features here are of other weights or images: of files with other times, or decoded by "
    "another version of Pillow."
)
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Extracted:
    """The backbones whose features are on disk.

    Attributes:
        folder: Of the run.
        records: Of the images, with components.
        study: Folds and resamples that all are judged on.
        ready: Backbone and weights, by name.
        keys: Of their features, by name.
        missing: By name, why a backbone has no features.
        gone: By name, why its weights are not here, though its features may be.
        random: Whether the weights are.
    """

    folder: Path
    records: list[Record]
    study: Study
    ready: dict[str, tuple[Backbone, Source]]
    keys: dict[str, str]
    missing: dict[str, str]
    gone: dict[str, str]
    random: bool

    @property
    def store(self) -> Store:
        """Of the features."""
        return Store(self.folder / "features")

    def load(self, name: str) -> Features:
        """One backbone's features."""
        return self.store.load(self.keys[name], *self.ready[name])


def extract(
    backbones: Sequence[Backbone],
    records: Sequence[Record],
    folder: Path,
    *,
    weights_dir: Path | None = None,
    weights_notes: Path | None = None,
    offline: bool = False,
    random: bool = False,
    measure_costs: bool = True,
) -> Extracted:
    """Have every backbone's features on disk; one without weights, or that fails, is left out.

    Args:
        backbones: Of the zoo.
        records: Labelled, with images.
        folder: Of the run.
        weights_dir: As `find_source` takes it.
        weights_notes: Likewise.
        offline: Likewise.
        random: Likewise.
        measure_costs: Whether throughput and memory are measured, too.

    Raises:
        DataError: The images are too few, or one cannot be read.
    """
    images = with_components(records)
    truth = np.array([int(bool(record.melanoma)) for record in images])
    # Before hours of work: it knows whether the images are enough.
    study = probes.design(truth, [record.component for record in images], SEED)
    work, missing = [], {}
    gone: list[tuple[Backbone, Source]] = []
    for backbone in backbones:
        try:
            source, wanted = find_source(
                backbone, weights_dir, weights_notes, offline, random, SEED
            )
            work.append((wanted, source))
        except WeightsError as error:
            missing[backbone.name] = str(error)
            # Its features may be here although its weights are not.
            source, wanted = find_source(backbone, weights_dir, weights_notes)
            gone.append((wanted, source))
    keys = keys_of([*work, *gone], images)
    store = Store(folder / "features")
    missing |= extract_all(work, keys, images, store)
    ready = {
        pair[0].name: pair for pair in [*work, *gone] if store.holds(pair[0], keys[pair[0].name])
    }
    if measure_costs:  # it takes no weights
        measure_all([backbone for backbone, _ in ready.values()], store)
    without = {
        name: f"{reason} {_OTHERS}" if store.holds_others(name) else reason
        for name, reason in missing.items()
        if name not in ready
    }
    away = {backbone.name: missing[backbone.name] for backbone, _ in gone}
    return Extracted(folder, images, study, ready, keys, without, away, random)


def compare(extracted: Extracted, command: str, budget: float | None = None) -> Report:
    """The whole report, without fine-tuning.

    Args:
        extracted: The backbones.
        command: That made it.
        budget: Milliseconds an image, for the recommendation.

    Raises:
        DataError: No backbone has features.
    """
    records, names = extracted.records, list(extracted.ready)
    if not names:
        raise DataError(
            "No backbone has features, for the reasons above. Weights are to be had with "
            "--weights-dir, or where they can be downloaded."
        )
    components = len({record.component for record in records})
    report = judge(names, extracted.load, extracted.study, components, budget)
    return report | {
        "command": command,
        "machine": machine(),
        "seed": SEED,
        "weights": "random" if extracted.random else "pretrained",
        "datasets": ", ".join(sorted({record.dataset for record in records})),
        "data_fingerprint": fingerprint(records),
        "interval": INTERVAL,
        "finetuned": [],
        "missing": extracted.missing,
        "cautions": _cautions(report, extracted),
    }


def tune_best(report: Report, extracted: Extracted, number: int, epochs: int) -> Report:
    """The report, with the best backbones fine-tuned; one that fails is listed, the rest go on.

    Args:
        report: Of `compare`.
        extracted: The backbones.
        number: How many.
        epochs: Of one cycle of the learning rate.
    """
    scores, failed = {}, {}
    for entry in report["backbones"][:number]:
        name = entry["name"]
        if name in extracted.gone:
            failed[f"{name}, fine-tuned"] = extracted.gone[name]
            continue
        try:
            scores[name] = finetune(
                *extracted.ready[name],
                entry["features"],
                extracted.records,
                extracted.study,
                extracted.folder / "finetuned",
                extracted.keys[name],
                epochs,
            )
        # Too little memory comes as a RuntimeError.
        except (DataError, RuntimeError) as error:
            failed[f"{name}, fine-tuned"] = first_line(error)
    add_finetuned(report, extracted.study, scores)
    return report | {"finetuned": list(scores), "missing": report["missing"] | failed}


def _cautions(report: Report, extracted: Extracted) -> list[str]:
    lines = []
    if extracted.random:
        lines.append("RANDOM WEIGHTS: every figure here is of networks that learned nothing.")
    if report["of the 86"] < paper.BACKBONES:
        lines.append(
            f"Only {report['of the 86']} of the paper's 86 backbones are here; what was asked for "
            "and has no weights, or failed, is listed at the end."
        )
    share = report["melanomas"] / report["images"]
    if not _is_papers(extracted.records):
        lines.append(
            f"These are {report['images']:,} images, {share:.0%} of them melanoma, and not the "
            f"{paper.IMAGES:,} of the paper's table, half of them melanoma: its figures and these "
            "do not compare."
        )
    if any(b["note"] for b in report["backbones"]):
        lines.append("Some weights are not their library's own: see the notes beside them.")
    if len({record.dataset for record in extracted.records}) > 1:
        lines.append("Several sources are pooled: a probe can learn the source for the lesion.")
    return lines


def _is_papers(records: Sequence[Record]) -> bool:
    """Whether these are all of the balanced set's val."""
    return len(records) == paper.IMAGES and all(balanced.is_part(record) for record in records)
