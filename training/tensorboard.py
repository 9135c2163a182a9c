"""A run's log as TensorBoard reads it: `tensorboard --logdir runs`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.utils.tensorboard import SummaryWriter

from training.run import Run


class Scalars:
    """Where each epoch's figures go.

    Args:
        writer: Open.
    """

    def __init__(self, writer: SummaryWriter):
        self._writer = writer

    def add(self, row: Mapping[str, float]) -> None:
        """One epoch's row of the log; `train_age` is shown as `train/age`."""
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(_tag(name), value, int(row["epoch"]))
        self._writer.flush()


@contextmanager
def open_scalars(run: Run, epochs: int) -> Iterator[Scalars]:
    """To go on after so many whole epochs.

    What a run that was killed had written of later ones is not shown.
    """
    writer = SummaryWriter(str(run.tensorboard), purge_step=epochs + 1)
    try:
        yield Scalars(writer)
    finally:
        writer.close()


def _tag(name: str) -> str:
    part, _, what = name.partition("_")
    return f"{part}/{what}" if part in ("train", "validation") else name
