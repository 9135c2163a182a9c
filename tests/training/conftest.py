"""A run that was fitted, and its bundle, for whoever tests what can be done with them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.data.drawn import draw_isic_cli_old
from tests.training.folders import draw_balanced, draw_ham10000
from training import evaluate as evaluating
from training import fit as fitting
from training import statistics
from training.cli import cli
from training.config import Config
from training.fit import fit
from training.prepare import prepare
from training.run import Run

SMALL = Config(
    size=64,
    epochs=8,
    batch_size=8,
    learning_rate=5e-3,
    warmup_epochs=0.5,
    ema_decay=0.5,
    patience=8,
    train_on=("HAM10000", "isic2017"),
    precision="float32",  # on every machine
)


@contextmanager
def small() -> Iterator[None]:
    """What is learned here can be learned by two convolutions, in seconds."""

    def build(*_: object):
        backbone = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=3), nn.ReLU()
        )
        return backbone, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a service that was tested before may have changed it, and the sums
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "build_feature_map", build)
        # Few resamples: what is tested is what is measured, not how sharply.
        patch.setattr(evaluating, "REPLICATES", 30)
        patch.setattr(statistics, "_JACKKNIFE_PARTS", 20)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_backbone() -> Iterator[None]:
    with small():
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    ham = draw_ham10000(folder / "ham10000", 320)
    draw_balanced(folder / "balanced", ham)
    (folder / "originals").mkdir()
    shutil.copy(ham / "HAM10000_images" / "ISIC_0000001.jpg", folder / "originals")
    (folder / "other").mkdir()
    shutil.copy(ham / "HAM10000_images" / "ISIC_0000002.jpg", folder / "other" / "photo_x.jpg")
    draw_isic_cli_old(folder / "isic2017", first=8000)
    draw_isic_cli_old(folder / "isic2020", first=9000)
    return folder


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    with small():
        prepare(data, run, SMALL)
        fit(run, workers=0)
    return run


@pytest.fixture(scope="session")
def fitted_bundle(data: Path, fitted: Run) -> Path:
    with small():
        cli(["export", "--run", str(fitted.folder)], standalone_mode=False)
        arguments = [str(data), "--run", str(fitted.folder), "--publish"]
        cli(["evaluate", *arguments], standalone_mode=False)
    return fitted.folder / "bundle"
