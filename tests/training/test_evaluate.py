"""An evaluation says what was measured, beside its baselines, and what it cannot say."""

import csv
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from training import evaluate as evaluating
from training import paper, statistics
from training.data.layouts import Dataset, Place, balanced
from training.data.manifest import DataError, Record
from training.data.tables import Faults
from training.data.vocabulary import Diagnosis, Sex, Site, Split
from training.evaluate import evaluate
from training.predictions import Predictions, load_predictions, save_predictions
from training.report import render, save_report, to_json


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    """What is tested is what is measured, not how sharply."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "REPLICATES", 200)
        patch.setattr(statistics, "_JACKKNIFE_PARTS", 20)
        yield


@pytest.fixture
def fewest_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is the same whatever is drawn."""
    monkeypatch.setattr(evaluating, "REPLICATES", 20)


AGES = ("0-29", "30-44", "45-59", "60-74", "75+")


def records(count: int, dataset: str, split: Split, seed: int = 0) -> list[Record]:
    """Two images a lesion; melanoma is commoner in the old."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        lesion = number // 2
        age = float(5 * (lesion % 18))
        melanoma = bool(np.random.default_rng(lesion).random() < 0.1 + age / 150)
        made.append(
            Record(
                image=f"{dataset}-{number}",
                path="there",
                dataset=dataset,
                lesion=str(lesion),
                melanoma=melanoma,
                diagnosis=Diagnosis.MEL if melanoma else Diagnosis.NV,
                age=age,
                sex=(Sex.FEMALE, Sex.MALE)[int(generator.integers(2))],
                site=list(Site)[int(generator.integers(3))],
                split=split,
                component=f"{dataset}-{lesion}",
            )
        )
    return made


def predictions(images: list[Record], skill: float = 2.0, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    melanoma = np.array([bool(record.melanoma) for record in images])
    logit = skill * (melanoma - 0.5) + generator.normal(size=len(images))
    ages = np.array([float(record.age or 0) for record in images])
    right = np.eye(5)[np.searchsorted([30, 45, 60, 75], ages, side="right")]
    guessed = 0.6 * right + 0.4 * generator.dirichlet(np.ones(5), len(images))
    return Predictions(
        model="a model",
        records=images,
        probability=1 / (1 + np.exp(-logit)),
        threshold=0.5,
        outputs={"age": guessed},
        labels={"age": AGES},
        age_edges=(30, 45, 60, 75),
        logit=logit,
        age_years=ages + 3,
    )


@pytest.fixture(scope="module")
def report() -> dict:
    tested = records(240, "A", Split.TEST) + records(8, "tiny", Split.TEST)
    learned = records(300, "A", Split.TRAIN, seed=5)
    other = replace(predictions(tested, skill=0.5, seed=9), model="another")
    return evaluate(predictions(tested), learned, other)


def test_figures_have_intervals_and_stand_beside_baselines(report: dict) -> None:
    found = report["sets"]["A"]
    assert (found["images"], found["components"]) == (240, 120)
    for figure in ("AUROC", "partial AUROC above 80 % sensitivity", "Brier score"):
        estimate = found["melanoma"][figure]
        assert estimate["low"] < estimate["value"] < estimate["high"]
    assert found["class"]["metadata_only"]["training_rows"] == 300
    assert found["class"]["metadata_only"]["auroc"] > 0.55
    assert sum(map(sum, found["class"]["confusion"]["counts"])) == 240
    assert found["calibration"]["of a calibrated model of this size"] > 0
    for reading in ("F1, binary", "F1, macro", "F1, weighted"):
        assert found["class"][reading]["low"] < found["class"][reading]["value"]
        assert found["class"]["majority"][reading] < 1
    assert found["tasks"]["age"]["mean absolute error in years"]["value"] == pytest.approx(3)
    age = found["tasks"]["age"]
    assert age["accuracy"]["value"] > age["majority"]["accuracy"]


def test_too_few_images_are_not_evaluated(report: dict) -> None:
    assert report["not evaluated"] == ["tiny"]
    groups = report["sets"]["A"]["groups"]
    assert "AUROC" not in groups["diagnosis"]["melanoma"]
    assert "sensitivity" in groups["diagnosis"]["melanoma"]
    assert "specificity" not in groups["diagnosis"]["melanoma"]
    assert set(groups["sex"]) == {"female", "male"}
    assert set(groups["age"]) == set(AGES)
    with pytest.raises(DataError, match="nothing can be said"):
        evaluate(predictions(records(8, "tiny", Split.TEST)), [])


def test_two_models_are_compared_on_the_same_images(report: dict) -> None:
    compared = report["sets"]["A"]["compared"]
    assert compared["with"] == "another"
    assert compared["differences"]["AUROC"]["low"] > 0
    assert compared["differences"]["AUROC"]["p_value"] < 0.05
    tested = records(240, "A", Split.TEST)
    with pytest.raises(DataError, match="has no prediction for A-239"):
        evaluate(predictions(tested), [], predictions(tested[:-1]))


@pytest.mark.usefixtures("fewest_resamples")
def test_ten_lesions_of_each_class_are_enough_and_nine_are_not() -> None:
    both = records(100, "A", Split.TEST)
    few = [record for record in both if record.melanoma][:20]
    many = [record for record in both if not record.melanoma]
    assert "AUROC" in evaluate(predictions([*few, *many]), [])["sets"]["A"]["melanoma"]
    with pytest.raises(
        DataError, match=r"at least 10 lesions \(or patients, .*\) with and 10 without melanoma"
    ):
        evaluate(predictions([*few[:18], *many]), [])


@pytest.mark.usefixtures("fewest_resamples")
def test_the_other_models_predictions_may_stand_in_another_order() -> None:
    tested = records(100, "A", Split.TEST)
    model, other = predictions(tested), replace(predictions(tested, seed=9), model="another")
    order = list(range(len(tested)))[::-1]
    turned = replace(
        other,
        records=[tested[row] for row in order],
        probability=other.probability[order],
    )
    first, second = (evaluate(model, [], one)["sets"]["A"]["compared"] for one in (other, turned))
    assert first == second
    assert first["differences"]["AUROC"]["value"] != 0


@pytest.mark.usefixtures("fewest_resamples")
def test_a_model_that_is_always_right_has_exact_intervals_of_the_lesions_that_it_saw() -> None:
    tested = records(100, "A", Split.TEST)
    # Who is at the threshold is called.
    right = np.array([0.5 if record.melanoma else 0.1 for record in tested])
    found = evaluate(replace(predictions(tested), probability=right), [])["sets"]["A"]
    lesions = {record.lesion: record.melanoma for record in tested}
    with_melanoma = sum(bool(melanoma) for melanoma in lesions.values())
    without = len(lesions) - with_melanoma
    assert with_melanoma < without
    counts = found["class"]["confusion"]["counts"]
    assert counts == [[2 * without, 0], [0, 2 * with_melanoma]]
    for figure, clusters in {
        "AUROC": with_melanoma,
        "sensitivity": with_melanoma,
        "specificity": without,
        "balanced accuracy": with_melanoma,
        "positive predictive value": with_melanoma,
        "negative predictive value": without,
        "accuracy": len(lesions),
    }.items():
        estimate = found["melanoma"][figure]
        assert (estimate["value"], estimate["high"]) == (1, 1)
        assert estimate["low"] == pytest.approx(0.025 ** (1 / clusters)), figure


@pytest.mark.usefixtures("fewest_resamples")
def test_curves_are_those_of_the_images() -> None:
    tested = records(100, "A", Split.TEST)
    made = predictions(tested)
    found = evaluate(made, [])["sets"]["A"]
    truth = np.array([bool(record.melanoma) for record in tested])
    prevalence = truth.mean()
    assert found["calibration"]["Brier score of the prevalence"] == pytest.approx(
        prevalence * (1 - prevalence)
    )
    assert [point["threshold"] for point in found["decision curve"]] == [
        pytest.approx(percent / 100) for percent in range(1, 51)
    ]
    for point in found["decision curve"]:
        called, odds = (
            made.probability >= point["threshold"],
            point["threshold"] / (1 - point["threshold"]),
        )
        hits, alarms = (called & truth).mean(), (called & ~truth).mean()
        assert point["model"] == pytest.approx(hits - odds * alarms)
        assert point["all"] == pytest.approx(prevalence - odds * (1 - prevalence))
    for alarmed, sensitivity, threshold in found["roc"][1:]:
        called = made.probability >= threshold
        assert sensitivity == pytest.approx(called[truth].mean())
        assert alarmed == pytest.approx(called[~truth].mean())
    assert found["roc"][0] == [0, 0, 1]
    assert found["roc"][-1][:2] == [1, 1]


@pytest.mark.usefixtures("fewest_resamples")
def test_what_is_not_known_of_an_image_is_a_group_and_no_truth() -> None:
    tested = records(100, "A", Split.TEST)
    bare = [replace(record, age=None, site=None) for record in tested[:92]] + tested[92:]
    unlabelled = replace(predictions(tested), records=bare, labels={}, outputs={}, age_edges=())
    groups = evaluate(unlabelled, [])["sets"]["A"]["groups"]
    ages = {group: figures["images"] for group, figures in groups["age"].items()}
    # Lesions 46 to 49 are of people of 50 to 65 years.
    assert ages == {"unknown": 92, "40-59": 4, "60-79": 4}
    assert groups["site"]["unknown"]["images"] == 92
    # Of eight images nothing is said.
    assert evaluate(replace(predictions(tested), records=bare), [])["sets"]["A"]["tasks"] == {}
    known = [replace(record, age=None) for record in tested[:80]] + tested[80:]
    age = evaluate(replace(predictions(tested), records=known), [])["sets"]["A"]["tasks"]["age"]
    assert age["images"] == 20


@pytest.mark.usefixtures("fewest_resamples")
def test_a_mean_over_classes_has_no_interval_where_one_has_too_few_lesions() -> None:
    tested = records(240, "A", Split.TEST)
    for least, few in ((1, True), (9, True), (10, False)):
        # Of those under thirty, only so many lesions are left.
        young = sorted({r.component for r in tested if r.age is not None and r.age < 30})
        kept = [r for r in tested if r.component not in young[least:]]
        guessed = np.random.default_rng(0).dirichlet(np.ones(5), len(kept))
        made = replace(predictions(kept), outputs={"age": guessed})
        found = evaluate(made, [])
        age = found["sets"]["A"]["tasks"]["age"]
        for figure in ("balanced accuracy", "F1, macro"):
            assert np.isfinite(age[figure]["value"])
            assert np.isnan([age[figure]["low"], age[figure]["high"]]).all() == few
        assert np.isfinite(age["accuracy"]["low"])
        assert ("Without an interval" in render(found)) == few


@pytest.mark.usefixtures("fewest_resamples")
def test_images_of_what_there_is_no_label_for_are_counted() -> None:
    tested = records(240, "A", Split.TEST)
    sites = [str(r.site) for r in tested]
    labels = tuple(sorted(set(map(str, list(Site)[:2]))))
    made = replace(
        predictions(tested),
        outputs={"site": np.eye(2)[[int(site == labels[1]) for site in sites]]},
        labels={"site": labels},
    )
    found = evaluate(made, [])
    site = found["sets"]["A"]["tasks"]["site"]
    without = sum(str(r.site) not in labels for r in tested)
    assert site["of no label"] == without > 0
    assert site["images"] == len(tested) - without
    assert f"site: {without} further images are of what it has no label for" in render(found)


@pytest.mark.usefixtures("fewest_resamples")
def test_how_probabilities_lie_is_said_of_groups_with_enough_of_both_classes() -> None:
    tested = records(400, "A", Split.TEST)
    groups = evaluate(predictions(tested), [])["sets"]["A"]["groups"]
    less = "mean probability less prevalence"
    # Of a group that is defined by the outcome, it would say nothing of the model.
    assert all(less not in figures for figures in groups["diagnosis"].values())
    assert all(less in figures for figures in groups["sex"].values())


def test_a_source_that_was_not_learned_from_stands_beside_those_that_were() -> None:
    own, other = records(240, "A (part)", Split.TEST), records(240, "B", Split.TEST)
    better, worse = predictions(own, skill=4), predictions(other, skill=0.5)
    both = replace(
        predictions([*own, *other]),
        probability=np.concatenate([better.probability, worse.probability]),
        trained_on=("A (part)", "A (more)"),
    )
    found = evaluate(both, [], own=True)
    (name, unseen), *rest = found["not learned from"].items()
    assert (name, unseen["learned from"], rest) == ("B", ["A"], [])
    auroc = {name: figures["melanoma"]["AUROC"]["value"] for name, figures in found["sets"].items()}
    difference = unseen["AUROC difference"]
    assert difference["value"] == pytest.approx(auroc["B"] - auroc["A"])
    assert difference["low"] < difference["value"] < difference["high"] < 0
    assert "Sources that it never learned from" in render(found)
    assert evaluate(replace(both, trained_on=()), [], own=True)["not learned from"] == {}


@pytest.mark.usefixtures("fewest_resamples")
def test_what_a_dataset_that_was_learned_from_holds_too_is_not_foreign() -> None:
    own, other = records(240, "A", Split.TEST), records(240, "B", Split.TEST)
    both = replace(predictions([*own, *other]), trained_on=("A",))
    assert evaluate(both, [*own, *other])["not learned from"] == {}  # as far as is known
    (unseen,) = evaluate(both, [*own, *other], own=True)["not learned from"].values()
    held = [replace(r, dataset="A", split=Split.TRAIN) for r in other[:100]]
    (again,) = evaluate(both, [*own, *other, *held], own=True)["not learned from"].values()
    assert (again["images"], unseen["images"]) == (140, 240)
    assert again["AUROC"]["value"] != unseen["AUROC"]["value"]
    every = [replace(r, dataset="A", split=Split.TRAIN) for r in other]
    assert evaluate(both, [*own, *other, *every], own=True)["not learned from"] == {}


@pytest.mark.usefixtures("fewest_resamples")
def test_a_part_of_a_collection_may_be_the_source_that_was_held_out() -> None:
    tested = {name: records(120, name, Split.TEST) for name in ("A (old)", "A (new)", "B (1)")}
    found = replace(predictions([r for part in tested.values() for r in part]))
    for trained_on, learned, strange in (
        (("A (old)",), ["A (old)"], ["A (new)", "B"]),
        (("A (old)", "A (new)"), ["A"], ["B"]),
        (("B (1)",), ["B"], ["A"]),
    ):
        told = evaluate(replace(found, trained_on=trained_on), [], own=True)["not learned from"]
        assert list(told) == strange
        assert all(source["learned from"] == learned for source in told.values())


@pytest.mark.usefixtures("fewest_resamples")
def test_without_training_rows_there_is_no_metadata_baseline() -> None:
    found = evaluate(predictions(records(100, "A", Split.TEST)), [])["sets"]["A"]
    assert found["class"]["metadata_only"] is None
    assert found["tasks"]["age"]["metadata_only"] is None


@pytest.mark.usefixtures("fewest_resamples")
def test_a_manifest_without_components_is_clustered_by_its_lesions() -> None:
    tested = records(100, "A", Split.TEST)
    bare = [replace(record, component="") for record in tested]
    found = [evaluate(predictions(images), [])["sets"]["A"] for images in (tested, bare)]
    assert found[0]["components"] == found[1]["components"] == 50


class Page(HTMLParser):
    """What a browser would fetch, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_says_the_same_numbers(report: dict, tmp_path: Path) -> None:
    save_report(tmp_path, {**report, "cautions": ["<b>mind</b> the gap"]})
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    saved = json.loads((tmp_path / "report.json").read_text())
    assert page.fetched == []
    assert f"{saved['sets']['A']['melanoma']['AUROC']['value']:.3f}" in page.text
    assert "<b>mind</b> the gap" in page.text
    assert "Against another" in page.text
    few = "Not evaluated, for too few lesions (or patients) with or without melanoma: tiny."
    assert few in page.text
    assert render(report) == render(report)


def test_a_figure_without_a_value_is_null() -> None:
    assert json.loads(to_json({"value": float("nan"), "list": [0.1234567]})) == {
        "value": None,
        "list": [0.123457],
    }


def test_predictions_are_read_back_and_so_are_other_peoples(tmp_path: Path) -> None:
    tested = records(40, "A", Split.TEST)
    made = predictions(tested)
    save_predictions(tmp_path / "predictions.csv", made)
    found = load_predictions(tmp_path / "predictions.csv", tested, 0.5)
    np.testing.assert_allclose(found.probability, made.probability, atol=1e-6)
    np.testing.assert_allclose(found.outputs["age"], made.outputs["age"], atol=1e-6)
    assert (found.labels, found.age_edges) == (made.labels, made.age_edges)
    with (tmp_path / "theirs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image", "Melanoma_Probability"])
        writer.writerows([[record.image + ".jpg", "0.25"] for record in tested[:30]])
    found = load_predictions(tmp_path / "theirs.csv", tested, 0.2)
    assert len(found.records) == 30
    assert found.labels == {}
    # As `mmtl predict --csv` calls those of a folder.
    named = [replace(tested[0], image="ISIC_0000001"), replace(tested[1], image="train/a.png")]
    rows = "image,melanoma_probability\ntest/ISIC_0000001.jpg,0.1\ntrain/a.png,0.2\n"
    (tmp_path / "folder.csv").write_text(rows)
    found = load_predictions(tmp_path / "folder.csv", named, 0.2)
    assert found.probability.tolist() == [0.1, 0.2]
    # As Kaggle's set and `annotate` call them, where no other is called so.
    found = load_predictions(tmp_path / "folder.csv", [replace(tested[1], image="train/a")], 0.2)
    assert found.probability.tolist() == [0.2]
    (tmp_path / "folder.csv").write_text(rows + "train/a.jpg,0.3\n")
    with pytest.raises(DataError, match="a row for none"):
        load_predictions(tmp_path / "folder.csv", [replace(tested[1], image="train/a")], 0.2)


def test_a_row_answers_for_one_dataset_s_image(tmp_path: Path) -> None:
    path, both = tmp_path / "theirs.csv", [Record("001", "", name) for name in ("A", "B")]
    path.write_text("image,melanoma_probability\n001,0.1\n")
    with pytest.raises(DataError, match=r"A and B both have an image 001\. .* column `dataset`"):
        load_predictions(path, both, 0.5)
    path.write_text("image,melanoma_probability,dataset\n001,0.1,B\n")
    assert load_predictions(path, both, 0.5).records == both[1:]
    path.write_text("image,melanoma_probability\nISIC_0000001,0.1\n")  # the same everywhere
    same = [Record("ISIC_0000001", "", name) for name in ("A", "B")]
    assert load_predictions(path, same, 0.5).records == same


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("image,melanoma_probability,age_years\nA-0,0.1,inf\n", "'inf' is not a number"),
        ("image,melanoma_probability,age:75+,age:0-29\nA-0,0.1,1,0\n", "in order"),
        ("image\nA-0\n", "the column melanoma_probability is missing"),
        ("image,melanoma_probability\nA-0,1.5\n", "row 2, column melanoma_probability: '1.5' is"),
        ("image,melanoma_probability\nA-0,\n", "row 2, column melanoma_probability: '' is not a"),
        ("image,melanoma_probability\nA-0,0.1\nA-0,0.2\n", "A-0 stands in two rows"),
        ("image,melanoma_probability\nZ,0.1\n", "has a row for none of the 4 images"),
        (
            "image,melanoma_probability,site:torso,site:anterior torso\nA-0,0.1,1,0\n",
            "site:anterior torso is none of site: head/neck, ",
        ),
        ("image,melanoma_probability,diagnosis:mel\nA-0,0.1,1\n", "diagnosis:mel is none of"),
        ("image,melanoma_probability,age:young,age:old\nA-0,0.1,1,0\n", "not of the form 0-29"),
        *(
            (
                f"image,melanoma_probability,{','.join(ages)}\nA-0,0.1{',0' * len(ages)}\n",
                "every age",
            )
            for ages in (
                ("age:30-44", "age:45+"),
                ("age:0-29", "age:45+"),
                ("age:0-29", "age:20+"),
                ("age:0-29", "age:30-44"),
                ("age:0-29", "age:30-20", "age:21+"),
                ("age:0+", "age:1+"),
                ("age:x", "age:0+"),
            )
        ),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=sentence):
        load_predictions(path, records(4, "A", Split.TEST), 0.5)


def test_the_papers_set_is_described_with_its_leaks() -> None:
    train = [
        replace(r, lesion=f"IL_{n}", component=f"train {r.component}")
        for n, r in enumerate(records(80, "balanced", Split.TRAIN))
    ]
    val = [
        replace(r, image=f"v-{n}", lesion=f"IL_{n + 70}")
        for n, r in enumerate(records(80, "balanced", Split.TEST, seed=1))
    ]
    place = Place(Path("balanced"), {}, "balanced")
    dataset = Dataset(balanced, place, train + val, Faults(), [])
    assert paper.is_complete(dataset)
    clean = paper.find_clean(dataset, [])
    assert clean == {f"v-{n}" for n in range(10, 80)}
    found = paper.describe(dataset, clean, val[:40], predictions(val[:40]))
    assert "40 of its 1,962 images have pixels" in found["cautions"][0]
    assert "10 of its 80 test images are joined to its training images" in found["cautions"][1]
    assert {m["images"] for m in found["metadata_only"].values()} == {70, 80}
    # What a network itself has learned from is not clean either.
    learned = replace(val[20], dataset="ISIC 2020", image="again", split=Split.VALIDATION)
    known = paper.find_known([*val, replace(learned, lesion="IL_90")])
    assert known == {"v-20", "v-21"}  # of one component
    for seen, sentence in ((known, "2 of these images share"), (set(), "were left out of fitting")):
        told = paper.describe(dataset, clean, val[:40], predictions(val[:40]), seen)["cautions"]
        assert any(sentence in caution for caution in told)
    assert all(m["age"]["accuracy"] for m in found["metadata_only"].values())
    report = evaluate(predictions(val), train, subsets={paper.CLEAN: list(range(10, 80))})
    report["paper"] = found
    page = render(report)
    assert "0.8625" in page
    assert "balanced, clean" in page
    assert not paper.is_complete(replace(dataset, records=[replace(r, lesion=None) for r in val]))
