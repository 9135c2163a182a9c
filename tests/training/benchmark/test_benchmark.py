"""`mmtl-train benchmark`, from drawn pictures to a report."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.lesions import lesion
from training.backbones import Source, build, find_source
from training.benchmark import compare, features, finetune, probes
from training.benchmark.features import Features, Store, in_own_process, keys_of, machine
from training.benchmark.report import save_report
from training.benchmark.table import judge
from training.benchmark.transferability import log_me
from training.cli import cli
from training.cli import main as run_command_line
from training.data.manifest import DataError, Record, load_manifest, save_manifest
from training.zoo import choose, load_zoo

MMTL_TRAIN = str(Path(sys.executable).with_name("mmtl-train"))
TINY = ["squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"]
LIGHT = [b.name for b in load_zoo() if b.multiply_adds < 0.45e9]
ODD = ["inception_v3", "swin_t", "deit_tiny_patch16_224", "googlenet"]
HEAVY = [b.name for b in load_zoo() if b.name not in {*LIGHT, *ODD}]


def draw(folder: Path, images: int = 20) -> Path:
    """A manifest of drawn lesions, half of them melanoma."""
    records = []
    for number in range(images):
        melanoma = number % 2 == 1
        path = folder / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lesion(number, 64, 48, melanoma))
        records.append(
            Record(
                image=f"drawn_{number}",
                dataset="drawn",
                path=str(path),
                melanoma=melanoma,
                component=f"lesion {number}",
            )
        )
    save_manifest(folder / "manifest.csv", records)
    return folder / "manifest.csv"


def run(manifest: Path, folder: Path, *arguments: str, names: list[str] | None = None):
    only = [part for name in names or TINY for part in ("--only", name)]
    told = ["benchmark", str(manifest), "--run", str(folder)]
    return CliRunner().invoke(cli, [*told, *only, *arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn"))


def test_the_report_says_what_was_found(drawn: Path, tmp_path: Path) -> None:
    result = run(drawn, tmp_path, "--weights", "random", "--budget", "10000")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [b["rank"] for b in report["backbones"]] == [1, 2, 3]
    assert {b["name"] for b in report["backbones"]} == set(TINY)
    assert report["recommended"] in TINY
    assert set(report["pareto"]) <= set(TINY)
    for b in report["backbones"]:
        assert [cost["batch size"] for cost in b["costs"]] == [1, 32]
        assert all(c["images per second"] > 0 and c["peak MB"] > 50 for c in b["costs"])
        assert 0 <= b["zero-train"]["low"] <= b["zero-train"]["value"] <= b["zero-train"]["high"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "src=" not in page
    assert "<script" not in page
    assert page.count("RANDOM WEIGHTS") >= 9
    with (tmp_path / "report" / "backbones.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [b["name"] for b in report["backbones"]]
    assert {row["weights are"] for row in rows} == {"random"}


def test_nothing_is_computed_twice(drawn: Path, tmp_path: Path) -> None:
    arguments = ("--weights", "random", "--no-costs")
    run(drawn, tmp_path, *arguments, names=TINY[:2])
    before = times(tmp_path / "features")
    assert len(before) == 2
    assert not list((tmp_path / "features").glob("pixels*"))
    run(drawn, tmp_path, *arguments, names=TINY)
    after = times(tmp_path / "features")
    assert len(after) == 3
    assert before.items() <= after.items()
    # Of other weights are other features, and these stay.
    torch.save(build(choose(TINY)[0]).state_dict(), tmp_path / f"{TINY[0]}.pth")
    run(drawn, tmp_path, "--weights-dir", str(tmp_path), "--no-costs", names=TINY[:1])
    assert len(times(tmp_path / "features")) == 4
    assert after.items() <= times(tmp_path / "features").items()


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}


def test_features_are_of_the_images_in_their_order(drawn: Path, tmp_path: Path) -> None:
    records = load_manifest(drawn)
    work = [(b, Source("random", "random, seed 0")) for b in choose(TINY[:1])]
    keys = [keys_of(work, chosen)[TINY[0]] for chosen in (records, records[::-1], records)]
    assert keys[0] == keys[2] != keys[1]


def test_costs_that_were_not_measured_are_measured_later(drawn: Path, tmp_path: Path) -> None:
    def costs() -> list[dict[str, float]]:
        report = json.loads((tmp_path / "report" / "report.json").read_text())
        return report["backbones"][0]["costs"]

    run(drawn, tmp_path, "--weights", "random", "--no-costs", names=TINY[:1])
    assert costs() == []
    run(drawn, tmp_path, "--weights", "random", names=TINY[:1])
    assert len(costs()) == 2


def test_costs_of_which_a_kill_left_some_are_measured_anew(drawn: Path, tmp_path: Path) -> None:
    (backbone,) = choose(TINY[:1])
    store = Store(tmp_path)
    store.save_costs(backbone, [])
    assert not store.costs_path(backbone).is_file()
    store.forget_costs(backbone)
    store.keep_costs(backbone)
    assert not list(tmp_path.iterdir())
    store.save_costs(backbone, [])
    store.keep_costs(backbone)
    assert json.loads(store.costs_path(backbone).read_text()) == []
    store.keep_costs(backbone)  # of a process that measured nothing
    assert [path.name for path in tmp_path.iterdir()] == [store.costs_path(backbone).name]


def test_a_process_that_dies_is_said_to_have_died() -> None:
    assert in_own_process(os._exit, 3) == "its process died; was there memory enough?"
    assert in_own_process(int, "x").startswith("invalid literal")
    assert in_own_process(len, "x") == ""


def test_what_a_killed_run_left_is_removed(drawn: Path, tmp_path: Path) -> None:
    left, used = (tmp_path / "features" / f"pixels-{name}" for name in ("left", "used"))
    for folder in (left, used):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    with (used / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another shard, on any machine, holds it
        run(drawn, tmp_path, "--weights", "random", "--no-costs", names=TINY[:1])
    assert not left.exists()
    assert used.exists()
    assert [path.name for path in (tmp_path / "features").glob("pixels-*")] == [used.name]


def test_costs_are_of_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "available_cores", lambda: 3)
    assert "3 cores of " in machine()


def test_cached_features_are_judged_and_timed_without_their_weights_and_not_tuned(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "finetune", None)  # which would download
    weights = tmp_path / "weights"
    weights.mkdir()
    told = ("--weights-dir", str(weights), "--offline", "--finetune", "1")
    (backbone,) = choose(TINY[:1])
    source, _ = find_source(backbone)
    records = load_manifest(drawn)
    generator = np.random.default_rng(0)
    store = Store(tmp_path / "run" / "features")
    arrays = (generator.normal(size=(len(records), n)).astype(np.float32) for n in (64, 1000))
    store.save(keys_of([(backbone, source)], records)[backbone.name], backbone, *arrays)
    result = run(drawn, tmp_path / "run", *told, names=TINY[:1])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert [b["name"] for b in report["backbones"]] == TINY[:1]
    assert report["backbones"][0]["costs"]
    assert report["recommended"] == TINY[0]
    assert "not on this machine" in report["missing"][f"{TINY[0]}, fine-tuned"]


def test_a_kill_half_way_costs_one_backbone_at_most(drawn: Path, tmp_path: Path) -> None:
    only = [part for name in TINY for part in ("--only", name)]
    told = [MMTL_TRAIN, "benchmark", str(drawn), "--weights", "random"]
    told += ["--no-costs", "--run", str(tmp_path), "-o", str(tmp_path / "report"), *only]
    process = subprocess.Popen(
        told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (done := list((tmp_path / "features").glob("*.npz"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in done}
    assert subprocess.run(told, capture_output=True, check=False).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert (tmp_path / "report" / "report.html").is_file()


def test_shards_fill_one_cache(drawn: Path, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        result = run(drawn, tmp_path, "--weights", "random", "--no-costs", "--shard", part)
        assert "Without --shard: report." in result.output
    assert not (tmp_path / "report").exists()
    assert len(list((tmp_path / "features").glob("*.npz"))) == 3
    with pytest.raises(DataError, match="without --shard"):
        run(drawn, tmp_path, "--shard", "1/2", "--finetune", "1")


def test_what_has_no_weights_is_listed_and_the_rest_goes_on(drawn: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (good, bad, _) = choose(TINY)
    torch.save(build(good).state_dict(), tmp_path / f"{good.name}.pth")
    torch.save({"one": torch.zeros(1)}, tmp_path / f"{bad.name}.pth")
    told = ("--weights-dir", str(tmp_path), "--offline", "--no-costs")
    result = run(drawn, tmp_path / "run", *told, names=[*TINY, "vit_h_14"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert [b["name"] for b in report["backbones"]] == [good.name]
    assert set(report["missing"]) == {bad.name, TINY[2], "vit_h_14"}
    assert "does not fit its network" in report["missing"][bad.name]
    assert "not on this machine" in report["missing"]["vit_h_14"]
    assert report["weights"] == "pretrained"
    assert "RANDOM" not in (tmp_path / "run" / "report" / "report.html").read_text()


def test_the_best_are_fine_tuned(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ("--weights", "random", "--no-costs", "--finetune", "1", "--finetune-epochs", "1")
    result = run(drawn, tmp_path, *told, names=TINY[1:])
    assert "fine-tuned (95 %)" in result.output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    first, second = report["backbones"]
    assert report["finetuned"] == [first["name"]]
    assert 0 <= first["fine-tuned"]["AUROC"]["value"] <= 1
    assert second["fine-tuned"] is None
    folds = times(tmp_path / "finetuned")
    assert len(folds) == probes.FOLDS
    run(drawn, tmp_path, *told, names=TINY[1:])
    assert folds == times(tmp_path / "finetuned")
    # By another recipe they are tuned anew.
    monkeypatch.setattr(finetune, "HEAD_RATE", 1e-3)
    run(drawn, tmp_path, *told, names=TINY[1:])
    assert not folds.items() & times(tmp_path / "finetuned").items()


def test_fine_tuning_that_fails_leaves_the_report(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\nat length")

    monkeypatch.setattr(compare, "finetune", fail)
    told = ("--weights", "random", "--no-costs", "--finetune", "1")
    result = run(drawn, tmp_path, *told, names=TINY[:1])
    assert result.exit_code == 0
    assert f"{TINY[0]}, fine-tuned: out of memory" in result.output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["missing"] == {f"{TINY[0]}, fine-tuned": "out of memory"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "test"], "has no labelled images of what was asked for; it has drawn (no "),
        (["--only", "resnet5O"], "Did you mean resnet50"),
        (["--shard", "3/2"], "write i/n"),
        (["--offline", "--only", "vgg11"], "No backbone has features, for the reasons above"),
        (["--offline", "--only", "vgg11", "--shard", "1/1"], "No backbone of this part has"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    drawn: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = ["mmtl-train", "benchmark", str(drawn), "--run", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", told)
    with pytest.raises(SystemExit) as stopped:
        run_command_line()
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed


def test_images_without_files_are_not_asked_for_by_another_name(tmp_path: Path) -> None:
    records = [Record(f"drawn_{n}", "", "drawn", melanoma=n % 2 == 0) for n in range(4)]
    save_manifest(tmp_path / "tables.csv", records)
    told = ["benchmark", str(tmp_path / "tables.csv"), "--run", str(tmp_path)]
    result = CliRunner().invoke(cli, told)
    assert isinstance(result.exception, DataError)
    assert "has both an image file and a label of melanoma" in str(result.exception)


def test_features_of_other_images_are_said_to_be_there(drawn: Path, tmp_path: Path) -> None:
    (backbone,) = choose(["vgg11"])
    Store(tmp_path / "features").save("another key", backbone, np.zeros(2), np.zeros(2))
    told = ["benchmark", str(drawn), "--run", str(tmp_path), "--offline", "--only", "vgg11"]
    result = CliRunner().invoke(cli, told)
    assert isinstance(result.exception, DataError)
    assert "is not on this machine. Its features here are of other weights" in result.output


def whole_tool(names: list[str], drawn: Path, folder: Path) -> None:
    result = run(drawn, folder, "--weights", "random", "--no-costs", names=names)
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["missing"] == {}
    assert {b["name"] for b in report["backbones"]} == set(names)
    records = load_manifest(drawn)
    work = [(backbone, Source("random", "random, seed 0")) for backbone in choose(names)]
    keys, store = keys_of(work, records), Store(folder / "features")
    for backbone, source in work:
        found = store.load(keys[backbone.name], backbone, source)
        assert found.logits.shape == (len(records), 1000)


def test_light_and_odd_backbones_pass_through_the_whole_tool(tmp_path: Path) -> None:
    """Auxiliary heads, SqueezeNet's convolution, Swin, a token; the others are a slow test."""
    whole_tool([*LIGHT, *ODD], draw(tmp_path, 10), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_others_pass_through_the_whole_tool(tmp_path: Path) -> None:
    whole_tool(HEAVY, draw(tmp_path, 10), tmp_path)


def test_light_odd_and_heavy_are_the_zoo() -> None:
    assert sorted([*LIGHT, *ODD, *HEAVY]) == sorted(b.name for b in load_zoo())


def simulated(name: str, truth: np.ndarray, channels: int, gap: float) -> Features:
    generator = np.random.default_rng(sum(map(ord, name)))
    features = generator.normal(size=(len(truth), channels)).astype(np.float32)
    features[:, 0] += gap * truth
    logits = generator.normal(size=(len(truth), 1000)).astype(np.float32)
    (backbone,) = choose([name])
    return Features(backbone, Source("random", "simulated"), (), features, logits)


def test_a_report_needs_no_throughput(tmp_path: Path) -> None:
    truth = np.arange(60) % 2
    study = probes.design(truth, [str(i) for i in range(60)], replicates=50)
    found = {n: simulated(n, truth, 30, gap) for n, gap in zip(TINY, (0, 3, 0), strict=True)}
    report = judge(list(found), found.__getitem__, study, 60)
    assert report["backbones"][0]["name"] == TINY[1]
    assert report["recommended"] is None
    # Features that say nothing are as good a guess as the labels' mean alone.
    nothing = report["backbones"][-1]["scores"]["LogME"]
    assert nothing == pytest.approx(log_me(np.ones((60, 1)), truth), abs=0.05)
    about = {
        "command": "c",
        "machine": "d",
        "seed": 0,
        "weights": "pretrained",
        "datasets": "x",
        "data_fingerprint": "0" * 64,
        "interval": "i",
        "finetuned": [],
        "missing": {},
        "cautions": [],
    }
    save_report(tmp_path, report | about)
    assert "No throughput was measured at batch 32" in (tmp_path / "report.html").read_text()
    save_report(tmp_path, report | about | {"recommended": TINY[1]})
    assert "the fastest that is not shown to be worse" in (tmp_path / "report.html").read_text()
    save_report(tmp_path, report | about | {"recommended": TINY[0]})  # the best was not timed
    said = f"the best that was timed, and shown to be worse than {TINY[1]}."
    assert said in (tmp_path / "report.html").read_text()
