"""Recipes tried on the same data, one after the other, and compared on the validation split."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models.bundle import BundleError
from models.files import write_atomically
from training.config import Config, changed_fields, parse_config, read_toml
from training.data.components import with_components
from training.data.manifest import DataError, fingerprint, first_line, load_manifest
from training.export import load_networks
from training.fit import fit, predict_logits
from training.folds import members
from training.metrics import auroc_or_nan
from training.network import melanoma_log_odds
from training.report import interval, number, to_json
from training.run import Run, to_calibrate_on
from training.state import load_tensors
from training.statistics import Clusters, Difference, Estimate, Statistic

Prepare = Callable[[Run, Config], object]
FIGURE = "AUROC"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one recipe.

    Attributes:
        recipe: By name.
        changes: What it changes of the first one, as a sentence names it.
        epochs: That it took, with those that did not help; of all networks, where it has several.
        minutes: That these epochs took.
        auroc: For melanoma, on validation.
        difference: Its AUROC less the first recipe's; None for the first.
    """

    recipe: str
    changes: str
    epochs: int
    minutes: float
    auroc: Estimate
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Answers:
    """What a fitted network says of its validation images.

    Attributes:
        images: By dataset and id.
        truth: Melanoma or not, [N].
        scores: Log-odds of melanoma, [N].
        components: What is resampled together, [N].
        data: Fingerprint of the manifest.
    """

    images: list[tuple[str, str]]
    truth: NDArray[np.bool_]
    scores: NDArray[np.float32]
    components: list[str]
    data: str


def load_recipes(path: Path) -> dict[str, Config]:
    """The recipes of a sweep: `[all]`, and what each of `[recipes.NAME]` changes of it.

    Args:
        path: A TOML file.

    Returns:
        By name, in the file's order; all are compared with the first.

    Raises:
        DataError: The file or a recipe in it is none, or two are the same.
    """
    given = read_toml(path)
    if unknown := sorted(set(given) - {"all", "recipes"}):
        raise DataError(f"{path}: there is no {unknown[0]} in a sweep; [all] and [recipes.NAME].")
    tables, common = given.get("recipes", {}), given.get("all", {})
    if not isinstance(common, dict) or not isinstance(tables, dict) or len(tables) < 2:
        raise DataError(f"{path}: a sweep needs at least two recipes, [recipes.NAME] each.")
    recipes: dict[str, Config] = {}
    for name, changes in tables.items():
        if not _NAME.fullmatch(name) or not isinstance(changes, dict):
            raise DataError(
                f"{path}: {name!r} cannot be a recipe; a table [recipes.NAME], with a name of "
                "small letters, digits, - and _."
            )
        config = parse_config(common | changes, f"{path}, recipe {name}")
        for other, before in recipes.items():
            if before == config:
                raise DataError(f"{path}: the recipes {other} and {name} are the same.")
            if before.validate_on != config.validate_on:
                raise DataError(f"{path}: {name} validates on other images than {other}.")
        recipes[name] = config
    return recipes


def sweep(
    recipes: Mapping[str, Config], folder: Path, prepare: Prepare, workers: int = 2
) -> list[Outcome]:
    """Fit every recipe and compare it with the first.

    A sweep that was stopped goes on where it was. The table is written anew after each recipe, as
    `sweep.md` and `sweep.json`. A recipe that fails does not keep the later ones from their turn.

    Args:
        recipes: By name.
        folder: Of the sweep; each recipe's run is a folder in it.
        prepare: Prepares a run.
        workers: Processes that augment images.

    Raises:
        DataError: The first recipe cannot be fitted, or (in the end) another one; a recipe was
            fitted with other settings before, or validates on other images.
    """
    outcomes: list[Outcome] = []
    failed: dict[str, str] = {}
    runs: list[Run] = []
    first: tuple[Config, Answers] | None = None
    for count, (name, config) in enumerate(recipes.items(), start=1):
        tqdm.write(f"{name} ({count} of {len(recipes)})")
        run = Run(folder / name)
        run.save_config(config)
        try:
            if not run.manifest.is_file():
                _share_pixels(runs, run)
            prepare(run, config)  # which, where it is fitted, refuses data that has changed
            fit(run, workers)
            answers = ask(run)
        # A RuntimeError is torch's, of too little memory for one.
        except (DataError, BundleError, RuntimeError, MemoryError) as error:
            why = str(error) if isinstance(error, DataError) else first_line(error)
            if first is None:  # nothing to compare with
                raise DataError(f"Recipe {name}: {why}") from None
            tqdm.write(f"Recipe {name}: {why}")
            failed[name] = why
            _write(folder, outcomes, first[1], recipes, failed)
            continue
        runs.append(run)
        if first is None:
            first = config, answers
        elif answers.images != first[1].images or answers.truth.tolist() != first[1].truth.tolist():
            raise DataError(f"{run.folder} validates on other images than the first recipe.")
        changes = ", ".join(changed_fields(first[0], config))
        outcomes.append(_outcome(name, changes, run, answers, first[1]))
        _write(folder, outcomes, first[1], recipes, failed)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(recipes)} recipes failed; {folder / 'sweep.md'} says why, and "
            "has the others. Mend or remove them, delete their folders, and sweep again."
        )
    return outcomes


def ask(run: Run) -> Answers:
    """What a run's best network says of its validation images.

    Raises:
        DataError: It is not fitted.
    """
    records, pixels = run.load_data()
    linked = with_components(records)
    validation = to_calibrate_on(records, run.load_config())
    logits = [predict_logits(one, pixels, validation) for one in load_networks(run, records)]
    scores = [melanoma_log_odds(one["melanoma"], one["diagnosis"]) for one in logits]
    return Answers(
        [(records[row].dataset, records[row].image) for row in validation],
        np.array([bool(records[row].melanoma) for row in validation]),
        torch.stack(scores).mean(dim=0).numpy(),
        [linked[row].component for row in validation],
        fingerprint(records),
    )


def table(
    outcomes: Sequence[Outcome],
    answers: Answers,
    recipes: Mapping[str, Config],
    failed: Mapping[str, str],
) -> str:
    """The comparison with the first recipe, as Markdown.

    Args:
        outcomes: Of the recipes that are done.
        answers: Of the first one.
        recipes: All.
        failed: Why, by recipe.
    """
    seed = next(iter(recipes.values())).seed
    melanomas = int(answers.truth.sum())
    chosen = (
        "Each network is of its best epoch on these same images, which favours many epochs, and "
        "the first recipe over those that start from what it chose."
    )
    if any(config.folds > 1 for config in recipes.values()):
        chosen += " Those of an ensemble are not chosen on them, which favours the other recipes."
    lines = [
        "# Recipes compared",
        "",
        "Generated by `mmtl-train sweep`. AUROC for melanoma on the validation split: "
        f"{len(answers.truth):,} images, {melanomas:,} melanomas. Of the first recipe: "
        f"data `{answers.data[:16]}`, seed {seed}. "
        f"{len(outcomes)} of {len(recipes)} recipes are done. Intervals are 95 %, over components, "
        "differences paired; they do not hold what another seed would change, and the best of "
        f"many is better here than it will be on other images. {chosen}",
        "",
        "| recipe | what it changes | epochs | minutes | AUROC | less the first |",
        "|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        less = interval(asdict(one.difference), 4) if one.difference else ""
        lines.append(
            f"| {one.recipe} | {one.changes} | {one.epochs} | {number(one.minutes, 1)} "
            f"| {interval(asdict(one.auroc), 4)} | {less} |"
        )
    lines += [f"| {name} | failed: {why} | | | | |" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


def _outcome(name: str, changes: str, run: Run, answers: Answers, first: Answers) -> Outcome:
    clusters = Clusters(answers.components)
    own, other = ({FIGURE: _auroc(found)} for found in (answers, first))
    fitted = [member for member, _ in members(run, load_manifest(run.manifest))]
    history = [row for one in fitted for row in load_tensors(one.checkpoint)["history"]]
    return Outcome(
        name,
        changes,
        len(history),
        sum(float(row["seconds"]) for row in history) / 60,
        clusters.bootstrap(own)[FIGURE],
        None if answers is first else clusters.compare(own, other)[FIGURE],
    )


def _auroc(answers: Answers) -> Statistic:
    return lambda chosen: auroc_or_nan(answers.truth[chosen], answers.scores[chosen])


def _same_data(one: Config, other: Config) -> bool:
    # Of another size, other pictures may look alike, and be of one component.
    return (one.train_on, one.test_on, one.size) == (other.train_on, other.test_on, other.size)


def _share_pixels(runs: Sequence[Run], run: Run) -> None:
    """Give a run the pixels of another of this size and data; its cache checks whether they fit."""
    config = run.load_config()
    for other in runs:
        before = other.load_config()
        if _same_data(before, config):
            run.take_pixels(other)
            return


def _write(
    folder: Path,
    outcomes: Sequence[Outcome],
    answers: Answers,
    recipes: Mapping[str, Config],
    failed: Mapping[str, str],
) -> None:
    done = [asdict(one) for one in outcomes]
    seed = next(iter(recipes.values())).seed
    found: dict[str, Any] = {
        "data": answers.data,
        "seed": seed,
        "recipes": done,
        "failed": dict(failed),
    }
    with write_atomically(folder / "sweep.json") as temporary:
        temporary.write_text(to_json(found))
    with write_atomically(folder / "sweep.md") as temporary:
        temporary.write_text(table(outcomes, answers, recipes, failed), encoding="utf-8")
