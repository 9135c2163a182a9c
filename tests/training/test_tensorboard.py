"""What TensorBoard reads of a run, also after a kill."""

import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.run import Run
from training.tensorboard import open_scalars


def read(run: Run, tag: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(run.tensorboard))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_epochs_that_are_run_again_are_shown_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with open_scalars(run, 0) as scalars:
        for epoch in (1, 2, 3):
            scalars.add({"epoch": epoch, "train_age": epoch / 2, "validation_auroc": 0.5})
    # Killed before the second epoch's checkpoint was written. Files are read by their names, which
    # are of seconds, and of a number of the process that sorts 10 before 9.
    time.sleep(1)
    with open_scalars(run, 1) as scalars:
        scalars.add({"epoch": 2, "train_age": 8, "validation_auroc": 0.75})
    assert read(run, "train/age") == [(1, 0.5), (2, 8.0)]
    assert read(run, "validation/auroc") == [(1, 0.5), (2, 0.75)]
