"""Everything that is said of the backbones, from their cached features, in seconds."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from models.cores import available_cores
from training import paper
from training.benchmark import probes, ranking, transferability, zero_train
from training.benchmark.features import COST_BATCH_SIZES, Features
from training.benchmark.probes import AUROC, Judged, Study
from training.zoo import Backbone

Floats = NDArray[np.floating]
Report = dict[str, Any]

# The head of the paper's table; every other seed stands in the table of chance.
FIXED_SEED = 0
# Each holds one backbone's features.
_THREADS = 8
SCORES = ("LogME", "LEEP", "NCE", "H-score", "ImageNet top-1")


@dataclass(frozen=True, slots=True)
class _Found:
    """What one backbone's features say, without its features."""

    accuracies: Floats
    logistic: Judged
    neighbours: Judged
    scores: dict[str, float]
    about: Report


def judge(
    names: Sequence[str],
    load: Callable[[str], Features],
    study: Study,
    components: int,
    budget: float | None = None,
) -> Report:
    """The report's numbers.

    Args:
        names: Of the backbones that have features.
        load: Reads one backbone's.
        study: Labels, folds, resamples.
        components: Number of lesions, patients or duplicates that the images are of.
        budget: Milliseconds an image that the recommended backbone may take.
    """

    def find(name: str) -> _Found:
        return _judge_one(load(name), study)

    # NumPy works without the interpreter's lock; its own threads would only get in the way.
    with threadpool_limits(1), ThreadPoolExecutor(min(available_cores(), _THREADS)) as pool:
        found = dict(
            zip(names, tqdm(pool.map(find, names), "judge", len(names), unit="net"), strict=True)
        )
    places = ranking.rank({name: one.logistic for name, one in found.items()})
    chance = zero_train.chance([one.accuracies for one in found.values()])
    images = len(study.truth)
    backbones = []
    for number, place in enumerate(places, start=1):
        one = found[place.name]
        index = list(found).index(place.name)
        accuracy = float(one.accuracies[FIXED_SEED])
        low, high = zero_train.wilson(accuracy, images)
        backbones.append(
            one.about
            | {
                "zero-train": {"value": accuracy, "low": low, "high": high},
                "chance": {
                    "mean": float(chance.mean[index]),
                    "low": float(chance.low[index]),
                    "high": float(chance.high[index]),
                    "called best": float(chance.called_best[index]),
                },
                "rank": number,
                "behind": place.behind,
                "p": place.p_value,
                "tied for first": place.tied,
                "logistic": _figures(one.logistic),
                "neighbours": _figures(one.neighbours),
                "scores": one.scores,
                "fine-tuned": None,
            }
        )
    worst, best = zero_train.extremes_by_chance(images, len(found))
    worst_of_86, best_of_86 = zero_train.extremes_by_chance(images, paper.BACKBONES)
    report: Report = {
        "images": images,
        "melanomas": int(study.truth.sum()),
        "components": components,
        "of the 86": sum(not backbone["extra"] for backbone in backbones),
        "backbones": backbones,
        "zero-train": {
            "head seed": FIXED_SEED,
            "seeds": len(next(iter(found.values())).accuracies),
            "best": chance.best,
            "worst": chance.worst,
            "tau": {"mean": chance.tau, "low": chance.tau_low, "high": chance.tau_high},
            "coins": {"best": best, "worst": worst},
            "coins of 86": {"best": best_of_86, "worst": worst_of_86},
            "paper": {
                "best": paper.BEST_BACKBONE,
                "worst": paper.WORST_BACKBONE,
            },
        },
        "correlations": _correlations(backbones),
        "budget": budget,
    }
    milliseconds = {
        backbone["name"]: backbone["costs"][0]["milliseconds"]
        for backbone in backbones
        if backbone["costs"]
    }
    report["recommended"] = ranking.recommend(places, milliseconds, budget)
    measured = [b for b in backbones if len(b["costs"]) == len(COST_BATCH_SIZES)]
    best_of = ranking.pareto(
        [b["logistic"][AUROC]["value"] for b in measured],
        [b["costs"][-1]["images per second"] for b in measured],
    )
    report["pareto"] = [b["name"] for b, on_it in zip(measured, best_of, strict=True) if on_it]
    return report


def add_finetuned(report: Report, study: Study, scores: Mapping[str, Floats]) -> None:
    """Set what fine-tuned backbones reach, and how well the cheaper scores foretold it.

    Args:
        report: Of `judge`.
        study: Its labels and folds.
        scores: Held out, [N], by name.
    """
    for backbone in report["backbones"]:
        if backbone["name"] in scores:
            # How far folds of fine-tuned networks hang together is not known.
            backbone["fine-tuned"] = _figures(probes.judge_scores(study, scores[backbone["name"]]))
    report["correlations"] = _correlations(report["backbones"])


def _judge_one(features: Features, study: Study) -> _Found:
    projected = probes.project(features.penultimate)
    backbone, source = features.backbone, features.source
    return _Found(
        accuracies=zero_train.accuracies(features.penultimate, study.truth),
        logistic=probes.logistic(projected, study),
        neighbours=probes.neighbours(projected, study),
        scores={
            # The features are centred, the labels are not: a constant stands for their mean.
            "LogME": transferability.log_me(
                np.column_stack([projected, np.ones(len(projected))]), study.truth
            ),
            "LEEP": transferability.leep(features.logits, study.truth),
            "NCE": transferability.nce(features.logits, study.truth),
            "H-score": transferability.h_score(projected, study.truth),
            "ImageNet top-1": backbone.imagenet_top1,
        },
        about=_about(backbone)
        | {
            "weights": source.label,
            "note": source.note,
            "features": int(features.penultimate.shape[1]),
            "costs": [
                {
                    "batch size": cost.batch_size,
                    "images per second": cost.images_per_second,
                    "milliseconds": 1000 / cost.images_per_second,
                    "peak MB": cost.peak_bytes / 1e6,
                }
                for cost in features.costs
            ],
        },
    )


def _about(backbone: Backbone) -> Report:
    kept = ("name", "family", "library", "extra", "input_size", "parameters", "multiply_adds")
    every = asdict(backbone)
    return {name: every[name] for name in kept}


def _figures(judged: Judged) -> Report:
    return {
        name: dict(zip(("value", "low", "high"), (value, *judged.interval(name)), strict=True))
        for name, value in judged.values.items()
    }


def _correlations(backbones: Sequence[Report]) -> Report:
    """Kendall's tau of every cheap score with the logistic probe, and with fine-tuning."""
    cheap: dict[str, list[float | None]] = {
        score: [backbone["scores"][score] for backbone in backbones] for score in SCORES
    }
    cheap["zero-train"] = [backbone["zero-train"]["value"] for backbone in backbones]
    cheap["k-NN"] = [backbone["neighbours"][AUROC]["value"] for backbone in backbones]
    probe: list[float | None] = [backbone["logistic"][AUROC]["value"] for backbone in backbones]
    tuned = [b["fine-tuned"][AUROC]["value"] if b["fine-tuned"] else None for b in backbones]
    found = {
        score: {
            "logistic": ranking.rank_correlation(values, probe),
            "fine-tuned": ranking.rank_correlation(values, tuned),
        }
        for score, values in cheap.items()
    }
    own = {"logistic": None, "fine-tuned": ranking.rank_correlation(probe, tuned)}
    return found | {"logistic probe": own}
