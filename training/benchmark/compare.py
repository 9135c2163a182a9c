"""One run of the benchmark: weights, features, what they say, and the cautions that apply."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.backbones import Source, WeightsError, find_source
from training.benchmark import probes
from training.benchmark.features import Features, Store, extract_all, key_of
from training.benchmark.finetune import finetune
from training.benchmark.probes import Study
from training.benchmark.table import judge
from training.data.components import with_components
from training.data.manifest import DataError, Record, fingerprint
from training.zoo import Backbone

SEED = 0
PAPER_IMAGES = 1962
INTERVAL = (
    "95 %, bootstrap over components within folds, widened by how much more the mean of folds "
    "strays on permuted labels"
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
        missing: By name, why a backbone has no features.
        random: Whether the weights are.
    """

    folder: Path
    records: list[Record]
    study: Study
    ready: dict[str, tuple[Backbone, Source]]
    missing: dict[str, str]
    random: bool

    @property
    def store(self) -> Store:
        """Of the features."""
        return Store(self.folder / "features")

    def load(self, name: str) -> Features:
        """One backbone's features."""
        return self.store.load(*self.ready[name])


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
    for backbone in backbones:
        try:
            source, wanted = find_source(
                backbone, weights_dir, weights_notes, offline, random, SEED
            )
            work.append((wanted, source))
        except WeightsError as error:
            missing[backbone.name] = str(error)
    store = Store(folder / "features")
    missing |= extract_all(work, images, store, measure_costs)
    ready = {pair[0].name: pair for pair in work if store.holds(pair[0], key_of(*pair, images))}
    return Extracted(folder, images, study, ready, missing, random)


def compare(
    extracted: Extracted, command: str, tuned: int = 0, epochs: int = 1, budget: float | None = None
) -> Report:
    """The whole report.

    Args:
        extracted: The backbones.
        command: That made it.
        tuned: How many of the best are fine-tuned.
        epochs: Of that.
        budget: Milliseconds an image, for the recommendation.

    Raises:
        DataError: No backbone has features.
    """
    records, study, names = extracted.records, extracted.study, list(extracted.ready)
    if not names:
        raise DataError(
            "No backbone has weights: give --weights-dir, or run where they can be downloaded."
        )
    components = len({record.component for record in records})
    report = judge(names, extracted.load, study, components, budget=budget)
    if tuned:
        scores = {
            entry["name"]: finetune(
                *extracted.ready[entry["name"]],
                entry["features"],
                records,
                study,
                extracted.folder / "finetuned",
                epochs,
            )
            for entry in report["backbones"][:tuned]
        }
        report = judge(names, extracted.load, study, components, scores, budget)
    return report | {
        "command": command,
        "device": _machine(report["backbones"][0]["device"]),
        "seed": SEED,
        "weights": "random" if extracted.random else "pretrained",
        "datasets": ", ".join(sorted({record.dataset for record in records})),
        "data_fingerprint": fingerprint(records),
        "interval": INTERVAL,
        "finetuned": [b["name"] for b in report["backbones"] if b["fine-tuned"]],
        "missing": extracted.missing,
        "cautions": _cautions(report, extracted),
    }


def _cautions(report: Report, extracted: Extracted) -> list[str]:
    of_86, missing = report["of the 86"], len(extracted.missing)
    lines = []
    if extracted.random:
        lines.append("RANDOM WEIGHTS: every figure here is of networks that learned nothing.")
    if of_86 < 86:
        left_out = f"; {missing} had no weights or failed, and are listed below" if missing else ""
        lines.append(f"Only {of_86} of the paper's 86 backbones are here{left_out}.")
    if report["images"] != PAPER_IMAGES:
        share = report["melanomas"] / report["images"]
        lines.append(
            f"These are {report['images']:,} images, {share:.0%} of them melanoma; the paper's "
            f"table is of {PAPER_IMAGES:,}, half of them melanoma. Its figures and these do not "
            "compare."
        )
    if any(b["note"] for b in report["backbones"]):
        lines.append("Some weights are not their library's own: see the notes beside them.")
    if len({record.dataset for record in extracted.records}) > 1:
        lines.append("Several sources are pooled: a probe can learn the source for the lesion.")
    return lines


def _machine(device: str) -> str:
    cores = f"{os.cpu_count()} {platform.machine()} cores"
    return cores if device == "cpu" else f"{device}, {cores}"
