"""Several processes fit what one would, and start again where one of them dies."""

import csv
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional

from tests.training import team_member
from tests.training.folders import draw_ham10000
from training import fit as fitting
from training import team as team_module
from training.config import Config
from training.data.manifest import DataError
from training.fit import check_shareable, fit
from training.losses import MultiTaskLoss, _whole, labels_of
from training.prepare import prepare
from training.run import Run
from training.tasks import MISSING, TASKS, Targets
from training.team import Team, WholeBatchDraws, meet

CONFIG = Config(
    size=32,
    epochs=3,
    batch_size=9,
    accumulate=2,
    warmup_epochs=0.5,
    ema_decay=0.5,
    freeze_batch_norm=True,
    imbalance="logit_adjustment",
    task_balancing="uncertainty",
    mixing="mixup",
    sizes=(32,),
    precision="float32",
)


def figures(run: Run) -> list[dict[str, float]]:
    with run.log.open() as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(file)
        ]


def test_two_processes_of_which_one_dies_fit_what_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_ham10000(tmp_path / "data" / "ham10000", 160)
    alone, together = Run(tmp_path / "alone"), Run(tmp_path / "together")
    prepare(tmp_path / "data", alone, CONFIG)
    shutil.copytree(alone.folder, together.folder)
    (together.folder / "dies").touch()
    monkeypatch.setattr(fitting, "build_feature_map", team_member.build)
    fit(alone, workers=0)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--max-restarts", "1", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
            *("-m", "tests.training.team_member", str(together.folder)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (together.folder / "dies").exists()
    assert "Resuming after epoch 1" in done.stdout + done.stderr
    assert len(figures(alone)) == 3
    for one, two in zip(figures(alone), figures(together), strict=True):
        assert two == pytest.approx(one, abs=1e-4)


def test_processes_that_start_again_meet_each_other_and_not_those_who_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(team_module, "ANSWER_WITHIN", timedelta(seconds=0.1))
    store = distributed.HashStore()
    with ThreadPoolExecutor() as threads:
        for generation in (b"first", b"second"):
            member = threads.submit(meet, store, 1, 2)
            time.sleep(0.3)  # the second finds what the first's leader left
            leader = meet(store, 0, 2)
            leader.set("generation", generation)
            assert member.result(10).get("generation") == generation


def targets(images: int) -> Targets:
    generator = torch.Generator().manual_seed(0)
    classes = {
        task.name: torch.randint(MISSING, task.classes, (images,), generator=generator)
        for task in TASKS
    }
    classes["sex"][:] = MISSING
    classes["sex"][0] = 1  # one process alone has it
    return Targets(classes)


@pytest.mark.parametrize("weights", [None, torch.linspace(0.1, 0.9, 7)], ids=["plain", "mixed"])
@pytest.mark.parametrize("balancing", ["uncertainty", "famo"])
def test_the_parts_of_a_batch_sum_to_its_loss(
    monkeypatch: pytest.MonkeyPatch, balancing: str, weights: torch.Tensor | None
) -> None:
    whole = replace(targets(7), weights=weights)
    logits = {task.name: torch.randn(7, task.outputs) for task in TASKS}
    loss = MultiTaskLoss(CONFIG.model_copy(update={"task_balancing": balancing}), whole)
    if loss.balance is not None:
        for number, variance in enumerate(loss.balance.values()):
            variance.data.fill_(0.1 * number + 0.2)  # as they are after some steps
    expected, parts_expected = loss(logits, whole)
    teams = [Team(rank, 2) for rank in range(2)]
    own = [torch.arange(7)[rank::2] for rank in range(2)]
    # What all processes have, as an all-reduce would give it.
    counts = [
        torch.tensor([*labels_of(mine).values(), count_of(mine)])
        for mine in (whole.take(rows) for rows in own)
    ]
    monkeypatch.setattr(Team, "sum", lambda _, values: sum(counts).double())
    parts = [team.part(whole.take(rows)) for team, rows in zip(teams, own, strict=True)]
    everywhere = torch.stack(list(loss._losses(logits, whole, _whole(whole))[0].values()))
    found = []
    for part, rows in zip(parts, own, strict=True):
        mine = {name: values[rows] for name, values in logits.items()}
        part = replace(part, sum=lambda values: everywhere.detach())
        found.append(loss(mine, whole.take(rows), part))
    assert sum(total for total, _ in found).item() == pytest.approx(expected.item(), abs=1e-5)
    for task, value in parts_expected.items():
        assert sum(parts[task] for _, parts in found) == pytest.approx(value, abs=1e-5)


def count_of(mine: Targets) -> float:
    return len(mine.classes["melanoma"]) if mine.weights is None else float(mine.weights.sum())


def test_what_is_dropped_does_not_depend_on_who_holds_the_image() -> None:
    values = torch.randn(7, 20) + 10
    torch.manual_seed(1)
    dropped = functional.dropout(values, 0.4)
    drawn = torch.empty(7, 1, 1, 1).bernoulli_(0.5)
    for rank in range(3):
        torch.manual_seed(1)
        own = torch.arange(7)[rank::3]
        with WholeBatchDraws(Team(rank, 3), 7):
            assert torch.equal(functional.dropout(values[own], 0.4), dropped[own])
            assert torch.equal(torch.empty(len(own), 1, 1, 1).bernoulli_(0.5), drawn[own])
            assert torch.equal(functional.dropout(values[own], 0.4, False), values[own])
            # Of an image's parts none is dropped, where nothing is.
            assert functional.dropout(values.new_ones(4 * len(own), 3), 0.0).all()


def test_what_cannot_be_shared_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with pytest.raises(DataError, match="set freeze_batch_norm"):
        check_shareable(network, Config(), 100, Team(0, 2))
    frozen = Config(freeze_batch_norm=True, batch_size=2)
    with pytest.raises(DataError, match="3 processes cannot share batches of 2"):
        check_shareable(network, frozen, 100, Team(0, 3))
    check_shareable(network, frozen, 100, Team(0, 2))
    check_shareable(network, Config(), 100, Team())
